"""Merged and adapter exports hold what was trained, whole or not at all."""

import json
import math

import pytest
import torch
from export_tiny import adapter, base, trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finegraft import FastLanguageModel, adapters
from finegraft.core.errors import AdapterError, ConfigError, ExportError, HubError, StorageError
from finegraft.export import FORMATS, _rounding, _save, _weights, merged_16bit
from finegraft.export._origin import open_origin
from finegraft.models.load import load_model

IDS = torch.randint(3, 600, (3, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return base(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def pair(folder):
    return trained(folder)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    return adapter(*pair, tmp_path_factory.mktemp("export") / "adapter")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def reopened(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_merged_folder_is_the_trained_model(pair, saved, tmp_path, where):
    source = pair if where == "memory" else saved
    [record] = merged_16bit.write(source, tmp_path / "out", dtype="float32")
    assert record.bytes > 0 and record.type == "merged_16bit"
    torch.testing.assert_close(logits(reopened(record.file)), logits(pair[0]), atol=2e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(record.file)
    assert tokenizer.chat_template == pair[1].chat_template
    assert not (record.file / "adapter_config.json").exists()


def test_disk_and_memory_give_the_same_bits_and_load_no_model(pair, saved):
    disk = open_origin(saved)
    one, two = _weights.open_plain(disk), _weights.open_plain(open_origin(pair))
    assert "_loaded" not in vars(disk)
    assert one.dtype == two.dtype == torch.bfloat16
    assert one.tensors.keys() == two.tensors.keys() and "lm_head.weight" not in one.tensors
    for name in one.tensors:
        assert torch.equal(one.tensors[name][...], two.tensors[name][...]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"method": "ia3"},
        {"method": "bitfit"},
    ],
    ids=str,
)
def test_every_mergeable_adapter_from_disk_and_memory(folder, tmp_path, settings):
    if settings.get("method") == "bitfit":
        folder = base(tmp_path / "biased", attention_bias=True)
    if "method" in settings:
        model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
        model = FastLanguageModel.get_peft_model(model, **settings)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    else:
        model, tokenizer = trained(folder, **settings)
    expected = logits(model)
    place = adapter(model, tokenizer, tmp_path / "adapter")
    for number, source in enumerate([(model, tokenizer), place]):
        [record] = merged_16bit.write(source, tmp_path / str(number), dtype="float32")
        torch.testing.assert_close(logits(reopened(record.file)), expected, atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(logits(model), expected)


def test_new_tokens_are_kept(folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    adapters.add_new_tokens(model, tokenizer, ["<order>", *(f"<n{i}>" for i in range(99))])
    model = FastLanguageModel.get_peft_model(model, r=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    place = adapter(model, tokenizer, tmp_path / "adapter")
    ids = torch.tensor([[*tokenizer.encode("hello <order><n98>", add_special_tokens=False)]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    for number, source in enumerate([(model, tokenizer), place]):
        [record] = merged_16bit.write(source, tmp_path / str(number), dtype="float32")
        again = reopened(record.file)
        assert AutoTokenizer.from_pretrained(record.file).encode("<n98>") == [int(ids[0, -1])]
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=5e-4, rtol=1e-3)


def test_a_quantized_base_merges_into_the_weights_it_came_from(folder, tmp_path):
    model = load_model(folder, dtype="float32", load_in_4bit=True, device_map="cpu")
    model = adapters.attach(model, r=4)
    plain = _weights.open_plain(open_origin((model, None)), "float32")
    assert "original precision" in plain.merged
    stored = reopened(folder).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(plain.tensors[name][...], stored[name])
    assert adapters.method_of(model) is not None and model.get_base_model().is_quantized


def test_shards_and_their_index(pair, tmp_path):
    merged_16bit.write(pair, tmp_path / "out", max_shard_size="60KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "out").glob("model-*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 2
    one = merged_16bit.write(pair, tmp_path / "one")[0].file
    assert torch.equal(
        logits(reopened(tmp_path / "out", torch.bfloat16)), logits(reopened(one, torch.bfloat16))
    )


def test_4bit(pair, tmp_path):
    [record] = FORMATS.get("merged_4bit").write(pair, tmp_path / "four")
    model = load_model(record.file)
    assert model.is_quantized
    error = (logits(model) - logits(pair[0])).norm() / logits(pair[0]).norm()
    assert 0.001 < error < 0.6, error


def test_the_adapter_alone(pair, saved, tmp_path):
    for number, source in enumerate([pair, saved]):
        [record] = FORMATS.get("lora").write(source, tmp_path / str(number))
        opened, _ = FastLanguageModel.from_pretrained(str(record.file), dtype="float32")
        torch.testing.assert_close(logits(opened), logits(pair[0]))
    assert FORMATS.get("lora").problems(pair, tmp_path) == []


def test_a_crash_leaves_the_old_export_whole(pair, tmp_path, monkeypatch):
    place = merged_16bit.write(pair, tmp_path / "out")[0].file
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    monkeypatch.setattr(pair[1], "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merged_16bit.write(pair, place)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_written_is_refused_before(pair, folder, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="FG-EXPORT-030"):
        merged_16bit.write(pair, tmp_path / "x", dtype="int8")
    with pytest.raises(ExportError, match="FG-EXPORT-031"):
        open_origin(3)
    with pytest.raises(ExportError, match="FG-EXPORT-032"):
        FORMATS.get("lora").write(folder, tmp_path / "x")
    with pytest.raises(ExportError, match="FG-EXPORT-033"):
        merged_16bit.write(pair, tmp_path / "x", max_shard_size="big")
    with pytest.raises(ConfigError, match="FG-MODEL-015"):
        FORMATS.get("merged_4bit").write(pair, tmp_path / "x", quant_type="int4")
    with pytest.raises(ConfigError, match=r"FG-CORE-001[\s\S]*merged_16bit"):
        _save.parse("merged-16bits")
    with pytest.raises(ExportError, match="FG-EXPORT-036"):
        _save.parse("gguf:q8")
    with pytest.raises(ExportError, match="FG-EXPORT-039"):
        _save.parse(" , ")
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(merged_16bit.shutil, "disk_usage", lambda place: full)
    with pytest.raises(StorageError, match="FG-EXPORT-034"):
        merged_16bit.write(pair, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_is_no_update_of_weights(folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    model = FastLanguageModel.get_peft_model(model, method="prefix")
    place = adapter(model, tokenizer, tmp_path / "adapter")
    for source in ((model, tokenizer), place):
        with pytest.raises(ExportError, match=r"FG-EXPORT-035[\s\S]*lora"):
            merged_16bit.write(source, tmp_path / "x")
    assert FORMATS.get("lora").write(place, tmp_path / "alone")[0].file.is_dir()


def test_another_base_is_refused(saved, folder, tmp_path):
    other = base(tmp_path / "other", seed=9)
    copy = tmp_path / "adapter"
    FORMATS.get("lora").write(saved, copy)
    values = json.loads((copy / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(other)
    (copy / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="FG-ADAPT-003"):
        merged_16bit.write(copy, tmp_path / "x")


def test_only_an_export_is_replaced(pair, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match=r"FG-EXPORT-037[\s\S]*thesis"):
        _save.export(pair, tmp_path / "mine", "merged-16bit", verify=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    for _ in range(2):
        _save.export(pair, tmp_path / "new", "lora", verify=False)


def test_unsloths_names_are_bound_to_the_instance(folder, pair, tmp_path):
    model, tokenizer = trained(folder)
    kinds = ("merged", "gguf")
    for name in [f"{does}_{kind}" for does in ("save_pretrained", "push_to_hub") for kind in kinds]:
        assert name in vars(model) and getattr(model, name).__self__ is model
        assert not hasattr(type(model), name)
    assert model.save_pretrained_merged(tmp_path / "m", tokenizer, verify=False).is_dir()
    path = model.save_pretrained_merged(tmp_path / "l", tokenizer, save_method="lora")
    assert (path / "adapter_config.json").is_file()
    assert json.loads((path / "verification.json").read_text())["verified"] is True
    with pytest.raises(TypeError, match="FG-ARG-001"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_methods="lora")
    with pytest.raises(HubError, match="FG-HUB-001"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, push_to_hub=True, repo_id="a/b/c")
    assert not (tmp_path / "x").exists()
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))


def test_small_updates_survive_in_bfloat16():
    """A sixteenth of a step on every weight: lost by the nearest value, kept on average here."""
    weight = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    step = torch.exp2(torch.floor(torch.log2(weight.abs())) - 7)
    moved = weight + step / 16
    assert torch.equal(moved.bfloat16().float(), weight)
    found = _rounding.rounded(moved, 3)
    assert found.dtype == torch.bfloat16
    share = float(((found.float() - weight) / step).mean())
    assert share == pytest.approx(1 / 16, rel=0.05)
    assert float(((found.float() - moved).abs() / step).max()) < 1, "one of the two neighbours"
    assert torch.equal(found, _rounding.rounded(moved, 3))
    assert torch.equal(_rounding.rounded(weight, 3).float(), weight), "what fits stays"
    odd = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    assert torch.equal(_rounding.rounded(odd, 1).float(), odd)
    assert _rounding.rounded(torch.tensor([float("nan")]), 1).isnan().all()


def test_only_trained_weights_are_rounded_at_random(saved, folder):
    plain = _weights.open_plain(open_origin(str(saved)))
    base = load_file(folder / "model.safetensors")
    trained = {name for name, tensor in plain.tensors.items() if tensor.seed is not None}
    assert trained and all("proj" in name for name in trained)
    for name, tensor in plain.tensors.items():
        assert (name in trained) != torch.equal(tensor[...], base[name])
