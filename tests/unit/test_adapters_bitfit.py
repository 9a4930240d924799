"""BitFit: differences to biases, merged to the bit, on any base that has biases."""

from __future__ import annotations

import adapters_tiny as t
import pytest
import torch

from finegraft import adapters
from finegraft.adapters.bitfit import BitFitLayer
from finegraft.core.errors import AdapterError

FAMILIES = ("qwen2", "bert", "roberta", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_identity(family):
    t.starts_as_the_identity(family, "bitfit")


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_families_give_the_same_logits_and_gradients(family):
    t.swapped_equals_stock(family, "bitfit")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_biases_and_a_new_head_learn(family):
    t.learns_and_leaves_the_base_alone(family, "bitfit", "bitfit_delta", lr=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_merges_to_the_bit(family):
    t.merges(family, "bitfit", bits=True)


@pytest.mark.parametrize("family", ["qwen2", "distilbert"])
def test_saved_and_opened_again_to_the_bit(family, tmp_path):
    t.reloads_to_the_bit(family, "bitfit", tmp_path)


def test_plain_peft_opens_it_after_importing_the_plug_in(tmp_path):
    t.opens_in_plain_peft("distilbert", "bitfit", "BITFIT", tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_two_named_adapters(family, tmp_path):
    t.holds_two_adapters(family, "bitfit", tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_a_four_bit_base_also_merges(family, tmp_path):
    model = t.works_on_four_bits(family, "bitfit", tmp_path)
    weights = {
        n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()
    }
    assert weights
    expected = t.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(t.logits(model), expected, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert name not in weights or torch.equal(p, weights[name])
    merged = model.merge_and_unload()
    torch.testing.assert_close(t.logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_bases_merge_to_the_bit():
    model = adapters.attach(t.tiny("qwen2").to(torch.bfloat16), "bitfit")
    assert {p.dtype for p in t.trainable(model).values()} == {torch.float32}
    expected = t.logits(t.moved(model))
    assert torch.equal(t.logits(model.merge_and_unload()), expected)


def test_every_bias_of_the_encoder_trains_and_no_head_is_wrapped():
    model = t.attached("distilbert", "bitfit")
    base = t.tiny("distilbert")
    biases = [n for n, _ in base.named_parameters() if n.endswith("bias") and "classifier" not in n]
    assert sum(isinstance(m, BitFitLayer) for m in model.modules()) == len(biases)
    heads = [n for n in t.trainable(model) if "modules_to_save" in n]
    assert len(heads) == 4  # weight and bias of pre_classifier and classifier


def test_several_active_adapters_add_up(tmp_path):
    model = t.moved(t.attached("qwen2", "bitfit"), seed=1)
    other = t.moved(t.attached("qwen2", "bitfit"), seed=2)
    other.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    layer = next(m for m in model.modules() if isinstance(m, BitFitLayer))
    x = torch.randn(2, 32)
    both = layer.base_layer(x) + layer.bitfit_delta["default"] + layer.bitfit_delta["other"]
    torch.testing.assert_close(layer(x), both)
    expected = t.logits(model)
    model.merge_adapter()
    assert torch.equal(t.logits(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(t.logits(model), t.logits(t.tiny("qwen2")))


def test_disabling_a_merged_adapter_gives_the_base_back():
    model = t.moved(t.attached("qwen2", "bitfit"))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(t.logits(model), t.logits(t.tiny("qwen2")))


def test_a_model_without_biases_is_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-023.*14 linear.*RMSNorm.*ia3.*lora"):
        t.attached("llama", "bitfit")


def test_a_target_without_a_bias_is_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-024.*o_proj.*without a bias"):
        t.attached("qwen2", "bitfit", target_modules=["o_proj"])
    with pytest.raises(AdapterError, match="FG-ADAPT-001"):
        t.attached("qwen2", "bitfit", target_modules=["nothing"])
    model = t.attached("qwen2", "bitfit", target_modules=["v_proj"])
    assert len(t.trainable(model)) == 2


def test_unknown_settings_are_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-021.*'bias'.*target_modules"):
        t.attached("qwen2", "bitfit", bias="all")


def test_a_diverged_adapter_is_not_merged_safely():
    model = t.attached("qwen2", "bitfit")
    next(iter(t.trainable(model).values())).data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="FG-ADAPT-029"):
        model.merge_and_unload(safe_merge=True)
