"""Bottleneck adapters: in series and in parallel, on decoders and encoders, and never merged."""

from __future__ import annotations

import adapters_tiny as t
import pytest
import torch
from torch import nn

from finegraft import adapters
from finegraft.adapters import _plugin, bottleneck
from finegraft.core.errors import AdapterError

FAMILIES = ("llama", "gemma2", "phi3", "bert", "roberta", "distilbert")
KINDS = {
    "houlsby": {"placement": "houlsby"},
    "pfeiffer": {},
    "parallel": {"placement": "houlsby", "parallel": True, "scaling": 4.0},
}
EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]
SOME = [("llama", "houlsby"), ("bert", "pfeiffer"), ("distilbert", "parallel")]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_starts_as_the_identity(family, kind):
    t.starts_as_the_identity(family, "bottleneck", **KINDS[kind])


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_swapped_families_give_the_same_logits_and_gradients(family, kind):
    t.swapped_equals_stock(family, "bottleneck", dropout=0.0, **KINDS[kind])


@pytest.mark.parametrize(("family", "kind"), SOME)
def test_only_the_adapter_and_a_new_head_learn(family, kind):
    t.learns_and_leaves_the_base_alone(family, "bottleneck", "bottleneck_", **KINDS[kind])


@pytest.mark.parametrize(("family", "kind"), [*SOME, ("llama", "parallel"), ("bert", "parallel")])
def test_saved_and_opened_again_to_the_bit(family, kind, tmp_path):
    t.reloads_to_the_bit(family, "bottleneck", tmp_path, **KINDS[kind])


def test_plain_peft_opens_it_after_importing_the_plug_in(tmp_path):
    t.opens_in_plain_peft("bert", "bottleneck", "BOTTLENECK", tmp_path, placement="houlsby")


@pytest.mark.parametrize(("family", "kind"), SOME)
def test_two_named_adapters(family, kind, tmp_path):
    t.holds_two_adapters(family, "bottleneck", tmp_path, **KINDS[kind])


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "houlsby"), ("llama", "parallel"), ("bert", "pfeiffer")]
)
def test_a_four_bit_base(family, kind, tmp_path):
    t.works_on_four_bits(family, "bottleneck", tmp_path, **KINDS[kind])


class _ByHand(nn.Module):
    """A linear layer and an adapter written out."""

    def __init__(self, layer, read, scaling):
        super().__init__()
        self.layer, self.read, self.scaling = layer, read, scaling

    def forward(self, x):
        name, layer = "default", self.layer
        h = layer.base_layer(x)
        down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
        inner = torch.tanh((x if self.read == "input" else h) @ down.weight.T + down.bias)
        return h + self.scaling * (inner @ up.weight.T + up.bias)


@pytest.mark.parametrize("parallel", [False, True])
def test_computes_what_the_papers_say(parallel):
    model = t.moved(
        t.attached(
            "llama",
            "bottleneck",
            non_linearity="tanh",
            bottleneck_size=5,
            parallel=parallel,
            scaling=3.0,
        )
    )
    mlp = model.get_base_model().model.layers[1].mlp
    layer = mlp if parallel else mlp.down_proj
    assert layer.bottleneck_down["default"].weight.shape[0] == 5
    x = torch.randn(4, 32 if parallel else 56)
    expected = _ByHand(layer, "input" if parallel else "output", 3.0)(x)
    torch.testing.assert_close(layer(x), expected)


def test_half_precision_bases_keep_float32_masters():
    model = t.tiny("llama").to(torch.bfloat16)
    want = t.logits(model)
    model = adapters.attach(model, "houlsby")
    assert {p.dtype for p in t.trainable(model).values()} == {torch.float32}
    assert torch.equal(t.logits(model), want)
    assert t.logits(t.moved(model)).dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    model = t.moved(t.attached("llama", "bottleneck", dropout=0.5))
    calm = t.logits(model)  # the base is in eval mode, and so is a fresh adapter
    assert torch.equal(t.logits(model), calm)
    assert not torch.equal(t.logits(model.train()), calm)


def test_sizes_and_the_number_of_parameters():
    model = t.attached("llama", "houlsby", reduction_factor=8)
    shapes = {tuple(p.shape) for p in t.trainable(model).values()}
    assert shapes == {(4, 32), (4,), (32, 4), (32,)}
    assert len(t.trainable(model)) == 2 * 2 * 4
    assert len(t.trainable(t.attached("llama", "pfeiffer"))) == 2 * 4


def test_named_targets():
    model = t.attached("llama", "bottleneck", target_modules=["v_proj"])
    assert all("v_proj" in name for name in t.trainable(model))
    beside = t.attached("llama", "bottleneck", target_modules=["v_proj"], parallel=True)
    shapes = {tuple(p.shape) for name, p in t.trainable(beside).items() if "down" in name}
    assert (2, 32) not in shapes and (1, 32) in shapes  # reads 32, writes 16
    with pytest.raises(AdapterError, match=r"FG-ADAPT-001.*'nothing'"):
        t.attached("llama", "bottleneck", target_modules=["nothing"])


def test_merging_is_refused_with_the_reason():
    for kind in KINDS.values():
        model = t.attached("llama", "bottleneck", **kind)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-026.*non-linearity.*lora"):
                merge()
        with pytest.raises(AdapterError, match="FG-ADAPT-026"):
            next(m for m in model.modules() if isinstance(m, _plugin.Layer)).merge()
    assert "non-linearity" in adapters.METHODS.get("bottleneck").not_mergeable


def test_series_and_parallel_do_not_share_a_model():
    model = t.attached("llama", "bottleneck")
    config = bottleneck.BottleneckConfig(task_type="CAUSAL_LM", parallel=True)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-027.*parallel=False"):
        model.add_adapter("other", config)
    model.add_adapter("another", bottleneck.BottleneckConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"placement": "hulsby"}, "did you mean 'houlsby'"),
        ({"non_linearity": "rellu"}, "did you mean 'relu'"),
        ({"bottleneck_size": 0}, "at least 1"),
        ({"reduction_factor": 0}, "above 0"),
        ({"dropout": 1.0}, "below 1"),
    ],
    ids=str,
)
def test_values_out_of_range(settings, says):
    with pytest.raises(AdapterError, match=rf"(?s)FG-ADAPT-022.*{says}"):
        t.attached("llama", "bottleneck", **settings)


def test_unknown_settings_get_a_near_name():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-021.*reduction_factor"):
        t.attached("llama", "bottleneck", reduction=4)


def test_what_peft_refuses_is_named():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-004.*excluded"):
        t.attached("llama", "bottleneck", target_modules=["mlp"], exclude_modules=".*")


def test_a_model_of_unknown_names_is_told_what_to_do():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-025.*Odd.*target_modules"):
        adapters.attach(Odd(), "bottleneck", task_type="CAUSAL_LM")


def test_a_method_that_peft_grew_itself_is_not_overwritten(monkeypatch):
    from peft import LoraConfig
    from peft import mapping as tables

    _plugin.register()
    monkeypatch.setitem(tables.PEFT_TYPE_TO_CONFIG_MAPPING, "BITFIT", LoraConfig)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-020.*BITFIT of its own"):
        _plugin.register()
