"""``finegraft.Trainer``: old names arrive, everything else is transformers' own."""

import logging

import pytest
import torch
import transformers

import finegraft
from finegraft.core.errors import ArgumentError


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        return {"loss": (self.weight * x - labels).square().mean()}


ROWS = [{"x": float(i), "labels": 2.0 * i} for i in range(1, 5)]


@pytest.fixture
def args(tmp_path):
    return finegraft.TrainingArguments(
        str(tmp_path), evaluation_strategy="epoch", save_strategy="no", learning_rate=0.3
    )


def test_2024_names_train(args, caplog):
    tokenizer = transformers.DataCollatorWithPadding  # any object will do: it is only kept
    with caplog.at_level(logging.WARNING):
        trainer = finegraft.Trainer(
            Line(),
            args,
            train_dataset=ROWS,
            eval_dataset=ROWS,
            tokenizer=tokenizer,
            data_collator=transformers.default_data_collator,
        )
    assert "Trainer: 'tokenizer' is called 'processing_class' now" in caplog.text
    assert trainer.processing_class is tokenizer
    trainer.processing_class = None
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < 30.0


def test_it_is_the_stock_trainer(args):
    assert issubclass(finegraft.Trainer, transformers.Trainer)
    assert set(vars(finegraft.Trainer)) - {"__module__", "__doc__"} == {"__init__"}


def test_an_unknown_name(args):
    with pytest.raises(ArgumentError, match=r"FG-ARG-001: Trainer has no argument 'train_dat"):
        finegraft.Trainer(Line(), args, train_data=ROWS)


def test_a_setting_given_twice(args):
    with pytest.raises(ArgumentError, match=r"FG-ARG-002: .*'tokenizer' and 'processing_class'"):
        finegraft.Trainer(Line(), args, tokenizer=1, processing_class=2)
