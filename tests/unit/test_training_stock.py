"""Stock trainers given our model: they train as with the stock model, through the fast path."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from training_tiny import llama, tokenizer

from finegraft.adapters import lora
from finegraft.models import causal_loss, families, flat, swap

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}


def rows():
    generator = torch.Generator().manual_seed(5)
    found = []
    for n in (5, 9, 17, 30, 4, 12, 21, 8, 33, 6, 7, 14):
        ids = torch.randint(3, 60, (n,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (n // 3 + 1) + ids[n // 3 + 1 :]})
    return Dataset.from_list(found)


def stock_trainer(model, folder):
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **SETTINGS),
        train_dataset=rows(),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True),
    )


def trl_trainer(model, folder, **settings):
    arguments = trl.SFTConfig(str(folder), **SETTINGS, gradient_checkpointing=False, **settings)
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows(), processing_class=tokenizer()
    )


@pytest.mark.parametrize(
    "make",
    [
        stock_trainer,
        trl_trainer,
        lambda m, f: trl_trainer(m, f, padding_free=True, max_length=None),
    ],
    ids=["transformers", "trl", "trl-padding-free"],
)
def test_stock_trainers_train_the_same_through_the_fast_path(tmp_path, monkeypatch, make):
    torch.manual_seed(0)
    model = lora.attach(llama(), r=4, lora_alpha=8)
    plain = copy.deepcopy(model)
    swap.undo(plain)
    causal_loss.apply(model)
    families.apply(model)
    taken = []

    def watched(*args):
        taken.append(original(*args))
        return taken[-1]

    original = flat.take
    monkeypatch.setattr(flat, "take", watched)
    losses = []
    for one, folder in ((plain, "plain"), (model, "fast")):
        trainer = make(one, tmp_path / folder)
        losses.append(trainer.train().training_loss)
    assert len(taken) >= 3 and all(batch is not None for batch in taken)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, trained[name], rtol=2e-3, atol=2e-5)
