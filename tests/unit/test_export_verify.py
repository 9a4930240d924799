"""Every planted fault makes ``verify`` fail and name it; what is right passes."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from export_tiny import adapter, base, change_json, change_weights, moved, trained
from transformers import AutoTokenizer

from finegraft import FastLanguageModel, adapters
from finegraft.core.errors import ExportError
from finegraft.export import FORMATS, _save, _verify, merged_16bit
from finegraft.export._origin import open_origin
from finegraft.export._verify import llama_cpp
from finegraft.export._weights import open_plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return base(tmp_path_factory.mktemp("verify") / "base")


@pytest.fixture(scope="module")
def pair(folder):
    return trained(folder)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    return adapter(*pair, tmp_path_factory.mktemp("verify") / "adapter")


@pytest.fixture
def merged(pair, tmp_path):
    return merged_16bit.write(pair, tmp_path / "out")[0].file


def names(report):
    return {check.name: check.ok for check in report.checks}


@pytest.mark.parametrize("name", ["merged_16bit", "lora", "merged_4bit"])
def test_what_is_right_passes(pair, saved, tmp_path, name):
    place = FORMATS.get(name).write(pair, tmp_path / "out")[0].file
    for against in (pair, saved):
        report = _verify.verify(place, against)
        assert report.verified and report.cause is None, report
        assert {"template", "token_ids", "log_probs", "adapter", "perplexity"} <= set(names(report))
        assert report.worst and report.rows == "built-in prompts"
    marked = json.loads((place / "verification.json").read_text())
    assert marked["verified"] is True and marked["format"] == name
    assert _verify.verify(place).verified  # the mark knows what it was compared with
    assert all(check.ok for check in FORMATS.get(name).verify(saved, place))


def fails(path, against, cause):
    report = _verify.verify(path, against)
    assert not report.verified
    assert cause in report.cause, report
    place = path if path.is_dir() else path.parent
    assert json.loads((place / "verification.json").read_text())["verified"] is False
    return report


def combined(pair, factor):
    """Merged weights with ``factor`` times the adapter."""
    model, tokenizer = pair
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= factor
    try:
        plain = open_plain(open_origin((model, tokenizer)))
        return {name: tensor[...].clone() for name, tensor in plain.tensors.items()}
    finally:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] /= factor


@pytest.mark.parametrize(
    ("factor", "cause"),
    [
        (0, "adapter not merged"),
        (2, "merged twice"),
        (0.5, "scale were 0.5 times"),
        (3, "scale were 3 times"),
    ],
)
def test_adapter_faults(pair, merged, factor, cause):
    tensors = combined(pair, factor or 1e-9)
    change_weights(merged, lambda _: tensors)
    fails(merged, pair, cause)


def test_wrong_scale_of_an_adapter_folder(pair, tmp_path):
    place = FORMATS.get("lora").write(pair, tmp_path / "out")[0].file
    change_json(place / "adapter_config.json", use_rslora=True)
    fails(place, pair, "wrong LoRA scale")


def test_permuted_queries_and_keys(pair, merged):
    def permute(tensors):
        for name, w in tensors.items():
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            if heads:
                halves = w.reshape(heads, 2, -1, w.shape[-1])
                tensors[name] = halves.transpose(1, 2).reshape(w.shape).contiguous()

    change_weights(merged, permute)
    fails(merged, pair, "q/k permutation")


def test_wrong_template(pair, merged):
    file = merged / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>assistant", "<|assistant|>"))
    report = fails(merged, pair, "wrong template")
    assert names(report)["template"] is False and names(report)["log_probs"] is True


def with_bos(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair[0].config.name_or_path)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return pair[0], tokenizer


def test_missing_and_doubled_bos(pair, tmp_path):
    source = with_bos(pair)
    place = merged_16bit.write(source, tmp_path / "out")[0].file
    assert _verify.verify(place, source).verified
    file = place / "chat_template.jinja"
    right = file.read_text()
    file.write_text(right.removeprefix("{{ bos_token }}"))
    fails(place, source, "missing BOS")
    file.write_text("{{ bos_token }}" + right)
    fails(place, source, "doubled BOS")


def test_untied_heads(folder, pair, merged, tmp_path):
    def other(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        return {**tensors, "lm_head.weight": head.flip(0).contiguous()}

    change_weights(merged, other)
    change_json(merged / "config.json", tie_word_embeddings=False)
    fails(merged, pair, "untied head")
    own = trained(folder, modules_to_save=["lm_head"])
    place = merged_16bit.write(own, tmp_path / "own")[0].file
    assert _verify.verify(place, own).verified
    change_json(place / "config.json", tie_word_embeddings=True)
    change_weights(place, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    fails(place, own, "untied head")
    change_json(place / "config.json", tie_word_embeddings=False)
    fails(place, own, "untied head")


def test_wrong_rope_scaling(pair, merged):
    change_json(
        merged / "config.json",
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    )
    fails(merged, pair, "wrong rope scaling")


def test_dropped_new_tokens(folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    plain = AutoTokenizer.from_pretrained(folder)
    adapters.add_new_tokens(model, tokenizer, ["<order>", "<ship>"])
    model = FastLanguageModel.get_peft_model(model, r=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    source = model, tokenizer
    place = merged_16bit.write(source, tmp_path / "out")[0].file
    assert _verify.verify(place, source).verified
    alone = FORMATS.get("lora").write(source, tmp_path / "lora")[0].file
    assert _verify.verify(alone, source).verified

    ids = tokenizer.convert_tokens_to_ids(["<order>", "<ship>"])

    def start(tensors):
        table = tensors["model.embed_tokens.weight"].clone()
        table[ids] = 0.5
        return {**tensors, "model.embed_tokens.weight": table}

    change_weights(place, start)
    fails(place, source, "dropped new tokens")
    plain.save_pretrained(place)
    fails(place, source, "dropped new tokens")


def test_nothing_to_compare_with_and_nothing_there(pair, merged, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="FG-EXPORT-040"):
        _verify.verify(merged)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="FG-EXPORT-044"):
        _verify.verify(tmp_path / "empty", pair)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"FG-EXPORT-041[\s\S]*finegraft\[serve\]"):
        llama_cpp.GgufReader(tmp_path / "x.gguf", 3)
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUFxx")
    with pytest.raises(ExportError, match="FG-EXPORT-043"):
        _verify.verify(file, pair)


def test_a_failed_export_is_loud_in_python(pair, tmp_path, monkeypatch):
    model, tokenizer = pair

    def wrong(plain, folder):
        plain.tokenizer.save_pretrained(folder)
        plain.config.save_pretrained(folder)
        change_weights(folder, lambda t: {n: v * 1.5 for n, v in t.items()})

    monkeypatch.setattr(merged_16bit, "write_rest", wrong)
    with pytest.raises(ExportError, match="FG-EXPORT-038"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)
    marked = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert marked["verified"] is False and marked["cause"]
    assert "**failed**" in (tmp_path / "out" / "README.md").read_text()


def test_tolerances_name_every_type():
    for name, form in FORMATS.items():
        for kind in form.variants:
            if name == "gguf":
                assert f"gguf:{kind}" in _verify.TOLERANCES
    assert all(math.isfinite(t.log_probs) for t in _verify.TOLERANCES.values())


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory):
    """llama.cpp wants heads and widths in blocks of 32."""
    pytest.importorskip("xllamacpp", reason="an extra: pip install 'finegraft[serve]'")
    place = tmp_path_factory.mktemp("gguf") / "base"
    return base(place, num_attention_heads=2, num_key_value_heads=1)


def test_gguf_passes_and_a_missing_permutation_fails(gguf_base, tmp_path, monkeypatch):
    pair = trained(gguf_base)
    done = _save.export(pair, tmp_path / "out", "gguf:f32,gguf:q8_0")
    for one in done:
        assert one.verified, (one.format, one.report)
    marked = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert marked["verified"] is True and len(marked["files"]) == 2
    from finegraft.export.gguf import architectures

    monkeypatch.setattr(architectures, "rotated", lambda weight, heads: weight)
    [bad] = _save.export(pair, tmp_path / "bad", "gguf:f32")
    assert not bad.verified and "q/k permutation" in bad.report.cause, bad.report


def test_gguf_faults_of_tokenizer_and_adapter(gguf_base, tmp_path):
    pair = trained(gguf_base)
    model = pair[0]
    from finegraft.export import gguf

    source = _save.gguf_source(open_origin(str(gguf_base)))
    [record] = gguf.write(source, tmp_path / "base", ["f32"])
    fails(record.file, pair, "adapter not merged")
    other = AutoTokenizer.from_pretrained(gguf_base)
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|end|>")
    [record] = gguf.write(_save.gguf_source(open_origin((model, other))), tmp_path / "t", ["f32"])
    fails(record.file, pair, "wrong template")


def test_gguf_faults_of_bos_and_rope(gguf_base, tmp_path):
    source = trained(gguf_base)[0], with_bos((trained(gguf_base)[0], None))[1]
    [good] = _save.export(source, tmp_path / "good", "gguf:f32")
    assert good.verified, good.report
    without = AutoTokenizer.from_pretrained(gguf_base)
    plain = _save.gguf_source(open_origin((source[0], without)))
    from finegraft.export import gguf

    [record] = gguf.write(plain, tmp_path / "bos", ["f32"])
    fails(record.file, source, "missing BOS")
    twice = with_bos((source[0], None))[1]
    twice.chat_template = "{{ bos_token }}" + twice.chat_template
    plain = _save.gguf_source(open_origin((source[0], twice)))
    [record] = gguf.write(plain, tmp_path / "twice", ["f32"])
    fails(record.file, source, "doubled BOS")
    changed = copy.deepcopy(_save.gguf_source(open_origin(source)).config)
    changed.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    wrong = dataclasses.replace(_save.gguf_source(open_origin(source)), config=changed)
    [record] = gguf.write(wrong, tmp_path / "rope", ["f32"])
    fails(record.file, source, "wrong rope scaling")


def test_a_classifier(tmp_path):
    from classifier_tiny import base as encoder

    from finegraft import FastClassifier

    encoder(tmp_path / "bert")
    model, tokenizer = FastClassifier.from_pretrained(str(tmp_path / "bert"), num_labels=3)
    model = moved(FastClassifier.get_peft_model(model, r=4))
    source = model, tokenizer
    for name in ("merged_16bit", "lora"):
        place = FORMATS.get(name).write(source, tmp_path / name)[0].file
        report = _verify.verify(place, source)
        assert report.verified, report
        assert report.rows == "built-in texts" and "perplexity" not in names(report)
    change_weights(tmp_path / "merged_16bit", lambda t: {n: v * 1.3 for n, v in t.items()})
    assert not _verify.verify(tmp_path / "merged_16bit", source).verified


def test_a_model_in_half_precision_that_is_answering(folder, tmp_path):
    model, tokenizer = trained(folder, dtype="bfloat16")
    FastLanguageModel.for_inference(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    [one] = _save.export((model, tokenizer), tmp_path / "out", "merged-16bit")
    assert one.verified, one.report
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_that_llama_cpp_does_not_load(gguf_base, tmp_path):
    from finegraft.export import gguf

    [record] = gguf.write(str(gguf_base), tmp_path, ["f32"])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(record.file.read_bytes()[:-50_000])
    with pytest.raises(ExportError, match="FG-EXPORT-042"):
        llama_cpp.GgufReader(cut, 640)
