"""Modes put back what they changed; scores equal what the model's own loss says."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finegraft.core.errors import DataError
from finegraft.inference.modes import for_inference, for_training
from finegraft.inference.score import exact_match, heldout_loss, row_losses


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).float()


def state(model):
    return (
        [m.training for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        model.config.use_cache,
        model.generation_config.use_cache,
    )


def test_for_training_restores_every_flag(model):
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].mlp.eval()
    model.config.use_cache = False
    before = state(model)
    assert any(before[1])

    assert for_inference(for_inference(model)) is model
    assert not model.training and not model.model.layers[0].mlp.training
    assert model.config.use_cache is True
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())

    assert for_training(for_training(model)) is model
    assert state(model) == before


def test_for_training_on_a_model_in_eval_mode_starts_training(model):
    for_training(for_inference(model.eval()))
    assert all(m.training for m in model.modules())
    assert for_training(model.eval()).training


def test_weights_keep_their_identity_and_their_requires_grad(model):
    model.lm_head.weight.requires_grad_(False)
    before = [(id(p), p.requires_grad) for p in model.parameters()]
    for_training(for_inference(model))
    assert [(id(p), p.requires_grad) for p in model.parameters()] == before


def rows():
    torch.manual_seed(1)
    ids = [torch.randint(0, 50, (n,)).tolist() for n in (3, 17, 9, 30, 5)]
    labels = [[-100] * (len(r) // 2) + r[len(r) // 2 :] for r in ids]
    return ids, labels


def test_heldout_loss_weighs_tokens_and_equals_the_models_own_loss(model):
    ids, labels = rows()
    model.eval()
    total = count = 0
    for row, label in zip(ids, labels, strict=True):
        n = sum(x != -100 for x in label[1:])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row]), labels=torch.tensor([label])).loss
        total, count = total + loss.item() * n, count + n
    model.train()
    for batch_size in (1, 2, 5):
        got = heldout_loss(model, ids, labels, pad_id=7, batch_size=batch_size)
        assert got == pytest.approx(total / count, rel=1e-5)
    assert model.training


def test_heldout_loss_without_labels_is_refused(model):
    with pytest.raises(DataError, match="FG-SCORE-001"):
        heldout_loss(model, [[1, 2, 3]], [[-100, -100, -100]])


def test_exact_match_strips_and_nothing_else():
    assert exact_match([" a\n", "B", "c"], ["a", "b", "c "]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("pair", [([], []), (["a"], ["a", "b"])])
def test_exact_match_needs_pairs(pair):
    with pytest.raises(DataError, match="FG-SCORE-002"):
        exact_match(*pair)


def test_each_row_has_its_own_loss(model):
    ids, labels = rows()
    heard = []
    sums, tokens = row_losses(
        model, ids, labels, pad_id=7, batch_size=2, on_progress=lambda *at: heard.append(at)
    )
    assert tokens == [sum(x != -100 for x in label[1:]) for label in labels]
    for row, label, total, count in zip(ids, labels, sums, tokens, strict=True):
        assert total / count == pytest.approx(heldout_loss(model, [row], [label]), rel=1e-5)
    assert heard == [(2, 5), (4, 5), (5, 5)]
