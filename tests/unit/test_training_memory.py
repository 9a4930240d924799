"""Which layers are recomputed: measured bytes, the memory there is, and unchanged results."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from datasets import Dataset
from training_tiny import tokenizer

from finegraft.models import causal_loss, families
from finegraft.training import memory
from finegraft.training.arguments import SFTConfig
from finegraft.training.dataset import Rendering, encode
from finegraft.training.sft import SFTTrainer


def made(layers=6):
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = peft.get_peft_model(
        LlamaForCausalLM(config),
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    causal_loss.apply(model)
    families.apply(model)
    return model.train()


def batch(tokens=64):
    ids = torch.randint(3, 99, (1, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def test_kept_bytes_grow_with_depth_and_tokens_and_checkpointing_lowers_them():
    model = made()
    whole = memory.kept_bytes(model, batch())
    two = {name: torch.cat([ids, ids]) for name, ids in batch().items() if name != "use_cache"}
    assert memory.kept_bytes(model, {**two, "use_cache": False}) == pytest.approx(
        2 * whole, rel=0.1
    )
    memory.apply(model, memory.Plan(6, 6, 0, 0))
    assert memory.kept_bytes(model, batch()) < 0.5 * whole


@pytest.mark.parametrize(("share", "least", "most"), [(100.0, 0, 0), (0.5, 3, 5), (1e-6, 6, 6)])
def test_as_many_layers_as_memory_asks_for(monkeypatch, share, least, most):
    model = made()
    needed = memory.plan(model, batch(), 4096)
    total = needed.bytes_per_layer * needed.layers
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(total * share / memory.SHARE))
    chosen = memory.plan(model, batch(), 4096)
    assert least <= chosen.recomputed <= most
    assert model.config.num_hidden_layers == 6
    memory.apply(model, chosen)
    layers = model.get_base_model().model.layers
    assert sum(layer.gradient_checkpointing for layer in layers) == chosen.recomputed


def trained(folder, model):
    ids = torch.randint(3, 99, (8, 12), generator=torch.Generator().manual_seed(2)).tolist()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(folder), max_steps=3, per_device_train_batch_size=4, report_to="none", seed=1
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_a_trainer_short_of_memory_trains_the_same(tmp_path, monkeypatch, caplog):
    model = made()
    plain = trained(tmp_path / "a", copy.deepcopy(model))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    short = trained(tmp_path / "b", model)
    assert "6 of 6 layers are recomputed" in caplog.text
    for a, b in zip(plain, short, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_rows_of_ids_are_cut_and_packed(caplog):
    rows = Dataset.from_dict({"input_ids": [[5] * 40, [6] * 7, [7] * 8]})
    how = Rendering(tokenizer(), max_length=16, packing=True)
    packed = encode(rows, how)
    assert sorted(map(len, packed["input_ids"])) == [15, 16]
    assert "1 of 3 rows have more than max_length=16 tokens and are cut" in caplog.text
    plain = encode(rows, Rendering(tokenizer(), max_length=64))
    assert [len(row) for row in plain["input_ids"]] == [40, 7, 8]
