"""Swaps are visible, exact, and undone without a trace; the loss is the stock loss."""

from __future__ import annotations

import json

import pytest
import torch
from training_tiny import llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
)

from finegraft.models import causal_loss, swap

IDS = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 300, 4, 2]])
LABELS = torch.tensor([[-100, -100, 33, 2, 77, -100], [-100, 7, -100, 300, 4, 2]])


def gemma2():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    # Wide weights: logits far enough out that a missing soft-cap is seen.
    config = Gemma2Config(**size, **heads, initializer_range=0.5, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config).eval()


def cohere():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 400}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = CohereConfig(**size, **heads, initializer_range=0.5, logit_scale=0.25)
    return CohereForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, gemma2, cohere])
def test_loss_and_every_gradient_equal_the_stock_model(make):
    stock, ours = make(), make()
    assert causal_loss.apply(ours)
    ours.train()
    stock.train()
    expected = stock(input_ids=IDS, labels=LABELS)
    found = ours(input_ids=IDS, labels=LABELS)
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward()
    found.loss.backward()
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_eval_with_labels_keeps_the_logits():
    model = llama()
    causal_loss.apply(model)
    assert model(input_ids=IDS, labels=LABELS).logits.shape == (2, 6, 640)
    assert model(input_ids=IDS, labels=LABELS, loss_only=True).logits is None


def test_positional_arguments_reach_the_right_names():
    model = llama()
    expected = model(IDS, torch.ones_like(IDS)).logits
    causal_loss.apply(model)
    model.train()
    torch.testing.assert_close(model(IDS, torch.ones_like(IDS)).logits, expected)


def test_no_label_gives_a_zero_loss_with_gradient():
    model = llama()
    causal_loss.apply(model)
    model.train()
    loss = model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() == 0.0


def test_a_model_whose_logits_are_more_than_its_head_is_refused():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            if labels is not None:
                out.loss = self.loss_function(out.logits * 3, labels, self.config.vocab_size)
            return out

    model = llama()
    model.__class__ = Louder
    assert not causal_loss.apply(model)
    (row,) = swap.report(model)
    assert row.fast is None and "its logits are not head(hidden)" in row.reason


def test_undo_gives_back_exactly_the_stock_model():
    model, other = llama(), llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert causal_loss.apply(model)
    assert [r.fast for r in swap.report(model)] == ["FastLlamaForCausalLM"]
    assert type(other) is LlamaForCausalLM  # other instances are not touched
    assert list(model.state_dict()) == list(before)
    assert swap.undo(model) == 1
    assert type(model) is LlamaForCausalLM and swap.report(model) == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_saved_configuration_names_the_stock_class(tmp_path):
    model = llama()
    causal_loss.apply(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert type(model).__name__ == "FastLlamaForCausalLM"


def test_a_replaced_forward_is_refused_with_a_reason():
    model = llama()
    model.forward = model.forward
    assert not causal_loss.apply(model)
    assert "replaced on the instance" in swap.summary(model)
