"""Several named adapters: each answers with its own numbers, nothing stale survives a switch."""

from __future__ import annotations

import peft
import pytest
import torch
from training_tiny import llama

import finegraft
from finegraft import adapters, opening
from finegraft.adapters import named
from finegraft.adapters.lora import FastLoraLinear
from finegraft.core.errors import AdapterError
from finegraft.inference import decode, modes
from finegraft.models import swap

WIDE = {"initializer_range": 0.2}
BATCH = {"input_ids": torch.tensor([[5, 9, 33, 3, 77, 8]]), "attention_mask": torch.ones(1, 6)}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def filled(model, name, seed):
    """Give the adapter ``name`` numbers that change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key and ("lora_B" in key or "prompt_encoder" in key):
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def two(second=None, **settings):
    """A model with the LoRAs ``one`` and ``two``; the second is active."""
    torch.manual_seed(3)
    model = named.add(llama(**WIDE), "one", r=4, **settings)
    named.add(model, "two", **{"r": 4, **settings, **(second or {})})
    return filled(filled(model, "one", 1), "two", 2)


def logits(model):
    model.eval()
    return model(**BATCH).logits.detach()


def test_each_answers_as_it_does_alone():
    model = two()
    for name, seed in (("one", 1), ("two", 2)):
        named.switch(model, name)
        torch.manual_seed(3)
        alone = named.add(llama(**WIDE), "one", r=4)
        if name == "two":
            named.add(alone, "two", r=4)
        filled(alone, name, seed)
        torch.testing.assert_close(logits(model), logits(alone))
        assert [row.name for row in named.listed(model) if row.active] == [name]
    base = logits(llama(**WIDE))
    with named.disabled(model):
        torch.testing.assert_close(logits(model), base)


def test_layers_are_fast_and_only_the_active_one_trains():
    model = two()
    assert "14 x FastLoraLinear" in swap.summary(model)
    for name in ("one", "two", "one"):
        named.switch(model, name)
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trains and all(f".{name}." in n for n in trains)
        layer = next(m for m in model.modules() if isinstance(m, FastLoraLinear))
        assert layer.refusal() is None


def test_listing_says_what_there_is():
    model = two({"r": 2})
    one, second = named.listed(model)
    assert (one.name, one.method, one.active, one.trainable) == ("one", "lora", False, 0)
    assert second.active and second.trainable == second.parameters == one.parameters // 2
    own = sum(p.numel() for n, p in model.named_parameters() if ".one." in n)
    assert one.parameters == own
    named.disable(model)
    assert not any(row.active for row in named.listed(model))


def test_disable_lasts_until_enable_and_the_context_puts_back_what_trained():
    model = two()
    adapted, base = logits(model), logits(llama(**WIDE))
    named.disable(model)
    torch.testing.assert_close(logits(model), base)
    with named.disabled(model):
        torch.testing.assert_close(logits(model), base)
    torch.testing.assert_close(logits(model), base)
    named.enable(model)
    torch.testing.assert_close(logits(model), adapted)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    with named.disabled(model):
        torch.testing.assert_close(logits(model), base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    torch.testing.assert_close(logits(model), adapted)


def deltas(model, name):
    return {
        key: module.get_delta_weight(name)
        for key, module in model.named_modules()
        if isinstance(module, FastLoraLinear)
    }


def test_cat_is_the_exact_sum_and_svd_is_near_it():
    model = two({"r": 2})
    one, second = deltas(model, "one"), deltas(model, "two")
    named.combine(model, ["one", "two"], [0.25, 0.75], "both")
    assert model.peft_config["both"].r == 6
    for key, found in deltas(model, "both").items():
        torch.testing.assert_close(found, 0.25 * one[key] + 0.75 * second[key])
    named.combine(model, ["one"], [1.0], "same", how="svd")
    for key, found in deltas(model, "same").items():
        torch.testing.assert_close(found, one[key], rtol=1e-3, atol=1e-4)
    assert [row.name for row in named.listed(model)] == ["one", "two", "both", "same"]


def test_linear_is_pefts_and_wants_equal_ranks():
    model = two()
    named.combine(model, ["one", "two"], [0.5, 0.5], "both", how="linear")
    assert model.peft_config["both"].r == 4
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-048.*different ranks.*'cat'"):
        named.combine(two({"r": 2}), ["one", "two"], [1, 1], "both", how="linear")


def test_what_cannot_be_combined_is_refused():
    model = two()
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-048.*2 adapters and 1 weights"):
        named.combine(model, ["one", "two"], [1], "both")
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-048.*'lineer' is unknown.*'linear'"):
        named.combine(model, ["one", "two"], [1, 1], "both", how="lineer")
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-048.*use_dora"):
        named.combine(two(use_dora=True), ["one", "two"], [1, 1], "both")
    prompts = named.add(llama(), "one", method="prompt")
    named.add(prompts, "two", method="prompt")
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-048.*no LoRA"):
        named.combine(prompts, ["one", "two"], [1, 1], "both")


def test_deleting_the_active_one_makes_the_first_of_the_others_active():
    model = two()
    named.switch(model, "one")
    expected = logits(model)
    named.switch(model, "two")
    named.delete(model, "two")
    torch.testing.assert_close(logits(model), expected)
    assert [(row.name, row.active) for row in named.listed(model)] == [("one", True)]
    assert all(".one." in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-049.*'one' is the only"):
        named.delete(model, "one")
    again = two()
    named.delete(again, "one")
    assert [(row.name, row.active) for row in named.listed(again)] == [("two", True)]


def test_names_that_are_unknown_taken_or_impossible_are_refused():
    model = two()
    for call in (named.switch, named.delete):
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-046.*'tow'.*did you mean 'two'"):
            call(model, "tow")
    for bad in ("one", "", "a.b", "a/b"):
        with pytest.raises(AdapterError, match="FG-ADAPT-046"):
            named.add(model, bad)
    for call in (named.listed, named.disable, named.enable):
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-046.*carries no adapter"):
            call(llama())
    with pytest.raises(AdapterError, match="FG-ADAPT-046"), named.disabled(llama()):
        pass
    with pytest.raises(AdapterError, match="FG-ADAPT-046"):
        named.combine(model, ["one", "two"], [1, 1], "two")


def test_a_second_adapter_is_of_the_first_ones_kind_and_leaves_the_base_alone():
    model = two()
    for other in ("ia3", "prefix", "bitfit", "bottleneck"):
        with pytest.raises(AdapterError, match=rf"(?s)FG-ADAPT-047.*'{other}'.*'lora'"):
            named.add(model, "third", method=other)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-047.*first adapter stands on"):
        named.add(model, "third", method="pissa")
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-047.*alpha_patern"):
        named.add(model, "third", alpha_patern={})
    with pytest.raises(AdapterError, match="FG-ADAPT-047"):
        named.add(model, "third", config=peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    assert [row.name for row in named.listed(model)] == ["one", "two"]


def test_configurations_are_taken_too():
    model = named.add(llama(), "one", config=finegraft.LoraConfig(r=2, target_modules=["q_proj"]))
    named.add(model, "two", config=peft.LoraConfig(r=3, target_modules=["v_proj"]))
    assert model.peft_config["two"].r == 3 and model.peft_config["two"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("method", ["ia3", "prefix", "prompt", "ptuning", "bottleneck", "bitfit"])
def test_other_methods_carry_several_too(method):
    more = {"attention_bias": True, "mlp_bias": True} if method == "bitfit" else {}
    torch.manual_seed(3)
    model = named.add(llama(**WIDE, **more), "one", method=method)
    torch.manual_seed(4)
    named.add(model, "two", method=method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3)
    one, two = named.listed(model)
    assert one.trainable == 0 and two.trainable == two.parameters > 0
    second = logits(model)
    named.switch(model, "one")
    first = logits(model)
    assert not torch.allclose(first, second)
    named.switch(model, "two")
    torch.testing.assert_close(logits(model), second)
    named.disable(model)
    torch.testing.assert_close(logits(model), logits(llama(**WIDE, **more)))
    named.enable(model)
    torch.testing.assert_close(logits(model), second)
    named.delete(model, "two")
    torch.testing.assert_close(logits(model), first)
    assert [(r.name, r.method, r.active) for r in named.listed(model)] == [("one", method, True)]


def greedy(model):
    return model.generate(**BATCH, **GREEDY)[0, 6:].tolist()


def test_fast_answers_follow_every_change():
    model, twin = two({"r": 2}), two({"r": 2})
    modes.for_inference(model)
    assert isinstance(swap.core(model), decode.FastDecoding)
    twin.eval()
    seen = [greedy(model)]
    assert seen == [greedy(twin)]
    for change in (
        lambda m: named.switch(m, "one"),
        lambda m: named.combine(m, ["one", "two"], [0.5, 0.5], "both"),
        named.disable,
        named.enable,
        lambda m: named.delete(m, "both"),
        lambda m: filled(named.add(m, "three", r=3), "three", 5),
        lambda m: named.delete(m, "three"),
        lambda m: named.switch(m, "two"),
    ):
        torch.manual_seed(0)
        change(model)
        torch.manual_seed(0)
        change(twin)
        assert not model.training and not any(m.training for m in model.modules())
        seen.append(greedy(model))
        assert seen[-1] == greedy(twin)
    assert len({tuple(answer) for answer in seen}) >= 4


def test_an_adapter_added_while_answering_trains_with_dropout_afterwards():
    model = named.add(llama(), "one", r=2, lora_dropout=0.5).train()
    modes.for_inference(model)
    named.add(model, "two", r=2, lora_dropout=0.5)
    modes.for_training(model)
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and all(m.training for m in dropouts)


def test_saved_adapters_come_back_by_name(tmp_path):
    model = two()
    expected = {}
    for name in ("one", "two"):
        expected[name] = logits(named.switch(model, name))
    model.save_pretrained(str(tmp_path))
    fresh = opening.attach_saved(llama(**WIDE), tmp_path / "one")
    opening.add_saved(fresh, "two", tmp_path / "two")
    torch.testing.assert_close(logits(fresh), expected["two"])
    assert not any(p.requires_grad for p in fresh.parameters())
    named.switch(fresh, "default")
    torch.testing.assert_close(logits(fresh), expected["one"])
    assert not any(p.requires_grad for p in fresh.parameters())
    with pytest.raises(AdapterError, match="FG-ADAPT-046"):
        opening.add_saved(fresh, "two", tmp_path / "two")
    with pytest.raises(AdapterError, match="FG-ADAPT-003"):
        other = named.add(llama(hidden_size=64), "mine", r=2)
        opening.add_saved(other, "two", tmp_path / "two")
    adapters.attach(llama(), "ia3").save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(AdapterError, match="FG-ADAPT-047"):
        opening.add_saved(fresh, "third", tmp_path / "ia3")
    (tmp_path / "two" / opening.WEIGHTS).unlink()
    with pytest.raises((AdapterError, ValueError)):
        opening.add_saved(fresh, "third", tmp_path / "two")
