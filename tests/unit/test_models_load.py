"""Loading: whole and harmless, or refused with the reason."""

import json
import logging
import os
import pickle
import zipfile

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from finegraft.core.errors import ConfigError, ModelError
from finegraft.core.hardware import default_dtype, facts
from finegraft.models import load, weights
from finegraft.models.load import load_config, load_model, load_tokenizer

BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
NO_GPU = pytest.mark.skipif(bool(facts().gpus), reason="about machines without a GPU")


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def as_pickle(folder, state):
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def test_weights_come_back_bit_for_bit_in_eval_mode(folder):
    model = load_model(folder, dtype="float32")
    assert not model.training
    for name, value in tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_the_default_dtype_is_the_machines(folder, dtype):
    assert load_model(folder, dtype=dtype).dtype == default_dtype()


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name_and_by_object(folder, dtype):
    assert load_model(folder, dtype=dtype).dtype == torch.bfloat16


def test_float16_is_replaced_on_a_cpu_with_one_warning(folder, caplog):
    assert load_model(folder, dtype="float16", device_map="cpu").dtype == default_dtype()
    assert [r.message for r in caplog.records if "float16" in r.message] == [
        f"float16 is slow and unstable on a CPU: using {default_dtype()}"
    ]


@pytest.mark.parametrize("dtype", ["int8", "flaot32", "nn"])
def test_other_dtypes_are_refused(folder, dtype):
    with pytest.raises(ConfigError, match=rf"FG-MODEL-010: dtype is '{dtype}'(.|\n)*bfloat16"):
        load_model(folder, dtype=dtype)


@NO_GPU
@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", 0, {"": 0}, {"": "cuda:1"}])
def test_a_missing_gpu_is_answered_with_one_line_and_the_cpu(folder, caplog, wanted):
    model = load_model(folder, device_map=wanted)
    assert model.device.type == "cpu"
    assert len([r for r in caplog.records if "cpu" in r.message]) == 1


@NO_GPU
@pytest.mark.parametrize("wanted", [None, "auto", "cpu", "balanced"])
def test_maps_that_fit_this_machine_say_nothing(folder, caplog, wanted):
    assert load_model(folder, device_map=wanted).device.type == "cpu"
    assert not [r for r in caplog.records if r.name.startswith("finegraft")]


def test_a_gpu_index_that_is_not_there_becomes_the_first(monkeypatch):
    two = type("Facts", (), {"gpus": ("a", "b"), "device": "cuda"})()
    monkeypatch.setattr(load, "facts", lambda: two)
    assert load.resolve_device("cuda:1") == {"": "cuda:1"}
    assert load.resolve_device(5) == {"": "cuda:0"}
    assert load.resolve_device("auto") == "auto"


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_cut_safetensors_file_is_named(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*model\.safetensors: "):
        load_model(folder)


def test_bytes_too_many_and_a_broken_header(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match=rf"is {len(whole) + 1:,} bytes long and should be"):
        load_model(folder)
    file.write_bytes(whole[:8] + b"[" + whole[9:])
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*header is damaged"):
        load_model(folder)


def test_an_index_that_names_a_missing_shard(folder):
    shards = folder.parent / "shards"
    tiny().save_pretrained(shards, max_shard_size="8KB")
    assert load_model(shards, dtype="float32").config.vocab_size == 64
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"FG-MODEL-005: .*not there: {gone.name}"):
        load_model(shards)


def test_an_index_may_not_leave_its_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*outside of its folder"):
        load_model(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*neither model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_pickle_of_tensors_loads(folder, zipped):
    (folder / "model.safetensors").unlink()
    torch.save(
        tiny().state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    model = load_model(folder, dtype="float32")
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight)


class Evil:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_pickle_with_code_is_refused_and_does_not_run(folder, form):
    target = folder.parent / "was-here"
    state = {**tiny().state_dict(), "x": Evil(target)}
    file = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    if form == "bare":
        file.write_bytes(pickle.dumps({"x": Evil(target)}, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ModelError, match=r"FG-MODEL-007: .*pytorch_model\.bin holds more than"):
        load_model(folder)
    assert not target.exists()
    if form == "bare":  # the trap works: an ordinary unpickler walks into it
        pickle.loads(file.read_bytes())
        assert target.exists()


def test_a_pickle_that_is_cut_off(folder):
    as_pickle(folder, tiny().state_dict())
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-500])
    assert not zipfile.is_zipfile(file)
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*not a readable checkpoint"):
        load_model(folder)


def test_safetensors_go_before_a_pickle_beside_them(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert [p.name for p in weights.check(folder)] == ["model.safetensors"]
    load_model(folder)


def test_missing_weights_are_an_error_and_never_random(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*9 weights .*model\.layers\.2\..*random"):
        load_model(folder)


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=40)
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*do not fit config"):
        load_model(folder)
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*of another shape.*mlp"):
        load_model(folder, task="sequence-classification")


def test_tied_weights_are_not_missing(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_classifier_may_have_a_new_head_and_keeps_an_old_one(folder, tmp_path):
    model = load_model(folder, task="sequence-classification", num_labels=3, dtype="float32")
    assert model.score.weight.shape == (3, 32)
    assert torch.equal(model.model.embed_tokens.weight, tiny().model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "trained")
    again = load_model(tmp_path / "trained", task="sequence-classification", dtype="float32")
    assert torch.equal(again.score.weight, model.score.weight)
    other = load_model(tmp_path / "trained", task="sequence-classification", num_labels=5)
    assert other.score.weight.shape == (5, 32)


def test_an_encoder_classifies_and_does_not_pass_for_a_chat_model(tmp_path):
    config = BertConfig(**BERT)
    BertModel(config).save_pretrained(tmp_path)
    labels = {0: "no", 1: "yes"}
    model = load_model(tmp_path, task="sequence-classification", num_labels=2, id2label=labels)
    assert model.config.id2label == labels
    with pytest.raises(
        ModelError, match=r"FG-MODEL-005: .*random(.|\n)*task='sequence-classification'"
    ):
        load_model(tmp_path)


def test_an_unknown_task(folder):
    with pytest.raises(ConfigError, match="FG-MODEL-013: task is 'translation'"):
        load_model(folder, task="translation")


def test_a_model_type_without_that_task(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=r"FG-MODEL-008: .*'clip' has no model for the task"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "it is missing"),
        ("{", "not readable JSON"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "lama"}', r"unknown model_type 'lama'(.|\n)*did you mean 'llama'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json: "),
    ],
)
def test_bad_configurations(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"FG-MODEL-008: .*{reason}"):
        load_config(tmp_path)


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({target!r}).touch()
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own-type"
"""


def test_code_of_a_model_runs_only_when_trusted(folder, monkeypatch, tmp_path):
    target = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(target=str(target)))
    auto_map = {"AutoConfig": "own.OwnConfig"}
    edit(folder / "config.json", model_type="own-type", auto_map=auto_map)
    with pytest.raises(ModelError, match=r"FG-MODEL-009(.|\n)*trust_remote_code=True"):
        load_model(folder)
    assert not target.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    assert load_config(folder, trust_remote_code=True).model_type == "own-type"
    assert target.exists()


def test_code_for_a_known_type_is_ignored_when_not_trusted(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"


def test_length_alone_changes_nothing_but_is_said(folder, caplog):
    model = load_model(folder, max_seq_length=256)
    assert model.config.rope_parameters["rope_type"] == "default"
    assert [r.getMessage() for r in caplog.records if r.name.endswith("rope")] == [
        "max_seq_length is 256 and the model knows 128 positions; rope_scaling extends them"
    ]


def test_linear_scaling_divides_the_frequencies(folder, caplog):
    plain = load_model(folder).model.rotary_emb.inv_freq
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        scaled = load_model(
            folder, rope_scaling={"type": "linear", "factor": 2.0}, max_seq_length=256
        )
    assert torch.equal(scaled.model.rotary_emb.inv_freq, plain / 2)
    assert scaled.config.max_position_embeddings == 256
    assert not [r for r in caplog.records if r.name.endswith("rope")]


def test_dynamic_scaling_starts_where_the_known_positions_end(folder):
    plain = load_model(folder, dtype="float32")
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    scaled = load_model(folder, rope_scaling=scaling, dtype="float32")
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(scaled(ids[:, :100]).logits, plain(ids[:, :100]).logits)
        assert not torch.equal(scaled(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    "wrong",
    [{"type": "linear"}, {"rope_type": "liner", "factor": 2}, {"type": "linear", "factor": 0.5}],
)
def test_wrong_scalings(folder, wrong):
    with pytest.raises(ConfigError, match="FG-MODEL-011: rope_scaling is"):
        load_model(folder, rope_scaling=wrong)


def test_scaling_without_a_rotary_embedding(tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"FG-MODEL-011: .*'bert' has no rotary"):
        load_model(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})


def test_a_folder_without_a_tokenizer(folder):
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*holds no readable tokenizer"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*holds no readable tokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_comes_back(folder):
    from test_models_tokenizer import toy

    toy().save_pretrained(folder)
    ids = load_tokenizer(folder)("a b").input_ids
    assert ids == AutoTokenizer.from_pretrained(folder)("a b").input_ids
