"""IA3 through peft, with targets that follow the paper on every layout of names."""

from __future__ import annotations

import adapters_tiny as t
import peft
import pytest
import torch

from finegraft import adapters
from finegraft.core.errors import AdapterError

FAMILIES = ("llama", "phi3", "bert", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_identity(family):
    t.starts_as_the_identity(family, "ia3")


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_families_give_the_same_logits_and_gradients(family):
    t.swapped_equals_stock(family, "ia3")


@pytest.mark.parametrize("family", ["llama", "bert", "distilbert"])
def test_only_the_factors_and_a_new_head_learn(family):
    t.learns_and_leaves_the_base_alone(family, "ia3", "ia3_l", lr=0.2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_merges(family):
    t.merges(family, "ia3")


@pytest.mark.parametrize("family", ["llama", "distilbert"])
def test_saved_and_opened_again_to_the_bit_by_peft_alone(family, tmp_path):
    t.reloads_to_the_bit(family, "ia3", tmp_path)


def test_two_named_adapters(tmp_path):
    t.holds_two_adapters("llama", "ia3", tmp_path)


def test_a_second_adapter_gets_the_same_targets():
    model = t.attached("distilbert", "ia3")
    adapters.named.add(model, "second", method="ia3")
    first, second = (model.peft_config[name] for name in ("default", "second"))
    assert first.target_modules == second.target_modules
    assert first.feedforward_modules == second.feedforward_modules
    assert all("second" in name for name in t.trainable(model))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_four_bit_base(family, tmp_path):
    model = t.works_on_four_bits(family, "ia3", tmp_path)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-076.*merge_to_16bit"):
            merge()
    assert not hasattr(model.unload(), "peft_config")


@pytest.mark.parametrize(
    ("family", "scaled", "inner"),
    [
        ("llama", {"self_attn.k_proj", "self_attn.v_proj"}, {"mlp.down_proj"}),
        ("phi3", {"self_attn.qkv_proj"}, {"mlp.down_proj"}),
        ("bert", {"attention.self.key", "attention.self.value"}, {"output.dense"}),
        ("distilbert", {"attention.k_lin", "attention.v_lin"}, {"ffn.lin2"}),
    ],
)
def test_targets_follow_the_paper(family, scaled, inner):
    model = t.attached(family, "ia3")
    found = {False: set(), True: set()}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.ia3.IA3Layer):
            found[module.is_feedforward].add(path.partition(".1.")[2])
    assert found[False] - {""} == scaled
    assert found[True] - {""} == inner


def test_named_targets_know_which_of_them_end_an_mlp():
    model = t.attached("llama", "ia3", target_modules=["q_proj", "down_proj"])
    assert model.peft_config["default"].feedforward_modules == {"down_proj"}
    model = t.attached("bert", "ia3", target_modules=r".*\.(key|output\.dense)")
    kinds = {n for n, m in model.named_modules() if getattr(m, "is_feedforward", False)}
    assert kinds and not any("attention.output" in name for name in kinds)
    with pytest.raises(AdapterError, match="FG-ADAPT-001"):
        t.attached("llama", "ia3", target_modules=["nothing"])


def test_unknown_settings_and_layouts_are_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-021.*init_ia3_weights"):
        t.attached("llama", "ia3", init_weights=True)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-004.*subset"):
        t.attached("llama", "ia3", target_modules=["k_proj"], feedforward_modules=["down_proj"])
    odd = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-025.*target_modules"):
        adapters.attach(odd, "ia3", task_type="CAUSAL_LM")
