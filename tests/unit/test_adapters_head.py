"""Head only: a classifier's head or a causal model's ``lm_head`` as an adapter folder."""

from __future__ import annotations

import adapters_tiny as t
import pytest
import torch
from training_tiny import llama
from transformers import LlamaModel

from finegraft import adapters, opening
from finegraft.core.errors import AdapterError

FAMILIES = ("llama", "bert", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_identity(family):
    t.starts_as_the_identity(family, "head")


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_families_give_the_same_logits_and_gradients(family):
    t.swapped_equals_stock(family, "head")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_head_learns(family):
    t.learns_and_leaves_the_base_alone(family, "head", "modules_to_save", lr=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_opened_again_to_the_bit(family, tmp_path):
    t.reloads_to_the_bit(family, "head", tmp_path)


def test_plain_peft_opens_it_after_importing_the_plug_in(tmp_path):
    t.opens_in_plain_peft("bert", "head", "HEAD", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_named_adapters(family, tmp_path):
    t.holds_two_adapters(family, "head", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_merges_to_the_bit(family):
    t.merges(family, "head", bits=True)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_four_bit_base(family, tmp_path):
    t.works_on_four_bits(family, "head", tmp_path)


def test_a_quantized_head_is_refused(tmp_path):
    base = t.four_bit("bert", tmp_path, dense=("nothing",))
    for method in ("head", "bitfit", "bottleneck", "ia3"):
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-028.*classifier.*skip_modules"):
            adapters.attach(base, method, task_type="SEQ_CLS")
    assert not hasattr(base, "peft_config")


def test_a_tied_head_is_untied_and_the_embedding_stays():
    model = adapters.attach(llama(), "head")
    t.moved(model)
    expected = t.logits(model)
    base = llama()
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    assert torch.equal(t.logits(merged), expected)
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_another_head_by_name():
    model = t.attached("bert", "head", modules_to_save=["pooler"])
    assert any("pooler" in name for name in t.trainable(model))
    assert any("classifier" in name for name in t.trainable(model))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-028.*classifier or score.*layers"):
        adapters.attach(LlamaModel(llama().config), "head", task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="FG-ADAPT-021"):
        t.attached("bert", "head", r=8)


def test_deleting_an_inactive_adapter_leaves_the_active_one():
    model = t.moved(t.attached("bert", "head"))
    expected = t.logits(model)
    model.add_adapter("other", type(model.peft_config["default"])(task_type="SEQ_CLS"))
    model.delete_adapter("other")
    assert torch.equal(t.logits(model), expected)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("method", ["head", "bitfit", "bottleneck", "ia3"])
def test_modules_that_loading_made_new_are_saved_too(method, tmp_path):
    model = t.tiny("bert")
    model.new_weights = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    model = t.moved(adapters.attach(model, method, task_type="SEQ_CLS"))
    expected = t.logits(model)
    model.save_pretrained(tmp_path)
    other = t.tiny("bert")
    torch.nn.init.normal_(other.bert.pooler.dense.weight)  # another new pooler
    assert torch.equal(t.logits(opening.attach_saved(other, tmp_path)), expected)
