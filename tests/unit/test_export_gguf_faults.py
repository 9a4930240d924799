"""GGUF files and GGUF adapters in llama.cpp: what is right passes, every planted fault is named."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from export_tiny import adapter, base, trained
from transformers import AutoTokenizer

from finegraft import FastLanguageModel, adapters
from finegraft.core.errors import ExportError
from finegraft.export import _save, _verify, gguf
from finegraft.export._origin import open_origin
from finegraft.export._verify import measure
from finegraft.export.gguf import architectures
from finegraft.export.gguf import lora as gguf_writer

pytest.importorskip("xllamacpp", reason="an extra: pip install 'finegraft[serve]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """llama.cpp wants heads and widths in blocks of 32."""
    place = tmp_path_factory.mktemp("faults") / "base"
    return base(place, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def pair(folder):
    return trained(folder)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    return adapter(*pair, tmp_path_factory.mktemp("faults") / "adapter")


def source_of(pair, **changes):
    return dataclasses.replace(_save.gguf_source(open_origin(pair)), **changes)


def fails(file, against, cause):
    report = _verify.verify(file, against)
    assert not report.verified
    assert cause in report.cause, report
    return report


@pytest.mark.parametrize(
    ("factor", "cause"),
    [(2, "adapter merged twice"), (0.5, "scale were 0.5 times"), (3, "scale were 3 times")],
)
def test_a_merge_of_another_strength(pair, tmp_path, factor, cause):
    with measure.scaled(pair[0], factor):
        [record] = gguf.write(source_of(pair), tmp_path, ["f16"])
    fails(record.file, pair, cause)


def test_an_untied_head_that_was_lost_and_one_that_was_made_up(folder, pair, tmp_path):
    own = trained(folder, modules_to_save=["lm_head"])
    [good] = _save.export(own, tmp_path / "good", "gguf:f16")
    assert good.verified, good.report
    right = source_of(own)
    tied = {name: t for name, t in right.tensors.items() if name != "lm_head.weight"}
    assert len(tied) == len(right.tensors) - 1
    config = copy.deepcopy(right.config)
    config.tie_word_embeddings = True
    lost = dataclasses.replace(right, tensors=tied, config=config)
    [record] = gguf.write(lost, tmp_path / "tied", ["f16"])
    fails(record.file, own, "untied head")
    plain = source_of(pair)
    head = plain.tensors["model.embed_tokens.weight"][...].flip(0).contiguous()
    tensors = {**plain.tensors, "lm_head.weight": _Held(head)}
    [record] = gguf.write(dataclasses.replace(plain, tensors=tensors), tmp_path / "own", ["f16"])
    fails(record.file, pair, "untied head")


class _Held:
    """A tensor with the face of safetensors' slices."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tensor.shape

    def __getitem__(self, index):
        return self.tensor[index]

    def get_shape(self):
        return list(self.tensor.shape)


def test_dropped_new_tokens(folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    adapters.add_new_tokens(model, tokenizer, ["<order>", "<ship>"])
    model = FastLanguageModel.get_peft_model(model, r=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    own = model, tokenizer
    [good] = _save.export(own, tmp_path / "good", "gguf:q8_0")
    assert good.verified, good.report
    right = source_of(own)
    plain = AutoTokenizer.from_pretrained(folder)
    [record] = gguf.write(dataclasses.replace(right, tokenizer=plain), tmp_path / "names", ["f16"])
    fails(record.file, own, "dropped new tokens")
    ids = tokenizer.convert_tokens_to_ids(["<order>", "<ship>"])
    table = right.tensors["model.embed_tokens.weight"][...].clone()
    table[ids] = table[:100].mean(0)
    tensors = {**right.tensors, "model.embed_tokens.weight": _Held(table)}
    [record] = gguf.write(dataclasses.replace(right, tensors=tensors), tmp_path / "rows", ["f16"])
    fails(record.file, own, "dropped new tokens")


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_an_adapter_beside_its_base_passes(pair, saved, tmp_path, kind):
    for source in (pair, str(saved)):
        [one] = _save.export(source, tmp_path / "out", f"gguf-lora:{kind}")
        assert one.verified and one.format == f"gguf_lora:{kind}", one.report
        assert one.report.format == one.format
    names = {check.name for check in one.report.checks}
    assert {"token_ids", "tensors", "weights", "facts", "log_probs", "adapter"} <= names
    assert _verify.verify(one.path).verified  # the mark knows what it was made of
    assert "--lora" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("factor", "settings"), [(0.25, {}), (2.0, {"use_rslora": True})])
def test_a_wrong_alpha(folder, tmp_path, monkeypatch, factor, settings):
    own = trained(folder, **settings)
    [good] = _save.export(own, tmp_path / "good", "gguf-lora")
    assert good.verified, good.report
    right = gguf_writer.alpha
    monkeypatch.setattr(gguf_writer, "alpha", lambda config: right(config) * factor)
    record = gguf.write_lora(own[0], tmp_path / "bad.gguf")
    monkeypatch.undo()
    report = fails(record.file, own, "wrong LoRA scale")
    assert {c.name for c in report.checks if not c.ok} >= {"facts", "log_probs", "adapter"}


def test_an_adapter_without_permutation_or_with_other_values(pair, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "rotated", lambda weight, heads: weight)
    record = gguf.write_lora(pair[0], tmp_path / "bad.gguf")
    monkeypatch.undo()
    report = fails(record.file, pair, "holds other values")
    assert not {c.name: c.ok for c in report.checks}["weights"]
    record = gguf.write_lora(trained(folder, seed=8)[0], tmp_path / "other.gguf")
    fails(record.file, pair, "holds other values")


def test_ollama_with_an_adapter(pair, tmp_path):
    [one] = _save.export(pair, tmp_path / "out", "ollama:adapter", options={"base_type": "f16"})
    assert one.verified and one.format == "ollama:adapter", one.report
    assert {"facts", "base_weights", "adapter"} <= {check.name for check in one.report.checks}
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    weights, beside = lines[0].removeprefix("FROM ./"), lines[1].removeprefix("ADAPTER ./")
    assert (tmp_path / "out" / weights).is_file() and (tmp_path / "out" / beside).is_file()
    listed = json.loads((tmp_path / "out" / "verification.json").read_text())["contents"]
    assert set(listed) == {weights, beside, "Modelfile", "README.md"}
    assert [r.artefact.name for r in _verify.verify_all(tmp_path / "out", pair)] == [beside]
    # the base of another model beside the right adapter
    other = trained(base(tmp_path / "b", num_attention_heads=2, num_key_value_heads=1, seed=5))
    source = _save.gguf_source(open_origin(other).base_origin)
    gguf.write(source, tmp_path / "out" / weights, "f16", name="base")
    report = fails(tmp_path / "out" / beside, pair, "")
    assert not {c.name: c.ok for c in report.checks}["base_weights"]


def test_ollama_with_a_base_that_ollama_has(pair, tmp_path):
    options = {"base": "smollm2:135m"}
    [one] = _save.export(pair, tmp_path / "out", "ollama:adapter", options=options)
    assert one.verified, one.report
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM smollm2:135m\nADAPTER ./")
    assert len(list((tmp_path / "out").glob("*.gguf"))) == 1
    with pytest.raises(ExportError, match="FG-EXPORT-047"):
        _save.export(pair, tmp_path / "x", "ollama:q8_0", options=options)


def test_what_no_gguf_adapter_can_hold_is_refused_before_anything_is_written(folder, tmp_path):
    own = trained(folder, use_dora=True)
    for to in ("gguf-lora", "ollama:adapter"):
        with pytest.raises(ExportError, match="FG-EXPORT-021"):
            _save.export(own, tmp_path / "x", to)
        with pytest.raises(ExportError, match="FG-EXPORT-032"):
            _save.export(str(folder), tmp_path / "x", to)
    assert not (tmp_path / "x").exists()
