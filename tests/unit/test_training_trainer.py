"""``finegraft.Trainer``: old names arrive, encoders are swapped, all else is transformers' own."""

import logging

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import finegraft
from finegraft.core.errors import ArgumentError
from finegraft.models import families, swap
from finegraft.training import heads


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
    own = set(vars(finegraft.Trainer)) - {"__module__", "__doc__"}
    assert own == {"__init__", "call_model_init", "train"}


def test_an_unknown_name(args):
    with pytest.raises(ArgumentError, match=r"FG-ARG-001: Trainer has no argument 'train_dat"):
        finegraft.Trainer(Line(), args, train_data=ROWS)


def test_a_setting_given_twice(args):
    with pytest.raises(ArgumentError, match=r"FG-ARG-002: .*'tokenizer' and 'processing_class'"):
        finegraft.Trainer(Line(), args, tokenizer=1, processing_class=2)


TARGETS = {"bert": "query", "distilbert": "q_lin", "roberta": "query"}


def adapted(name, dtype=torch.float32):
    """A tiny classifier with LoRA on its queries and a head that trains whole."""
    torch.manual_seed(3)
    model = families.FAMILIES.get(name).tiny().to(dtype)
    settings = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_dropout=0.01, target_modules=[TARGETS[name]]
    )
    return get_peft_model(model, settings)


def written(count=48):
    """Rows in which one token says the class."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(40, 131, (3 + i % 9,), generator=generator)
        ids[1] = 10 + i % 3
        rows.append({"input_ids": ids.tolist(), "labels": i % 3})
    return rows


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.ones(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", TARGETS)
def test_encoders_train_swapped_in_every_precision(name, dtype, tmp_path, caplog):
    model = adapted(name, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    args = finegraft.TrainingArguments(
        str(tmp_path),
        bf16=dtype == "autocast",
        save_strategy="no",
        learning_rate=2e-2,
        num_train_epochs=14,
        logging_steps=6,
        disable_tqdm=True,
    )
    with caplog.at_level(logging.INFO):
        trainer = finegraft.Trainer(model, args, collate, written())
    assert "x FastDropout" in caplog.text and "ForSequenceClassification" in caplog.text
    assert swap.is_swapped(model.get_base_model())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained.values())


def test_a_model_made_for_every_trial_is_swapped(tmp_path):
    trainer = finegraft.Trainer(
        args=finegraft.TrainingArguments(str(tmp_path)), model_init=lambda: adapted("bert")
    )
    assert swap.is_swapped(trainer.call_model_init().get_base_model())


def test_heads_are_float32_and_nothing_else_changes():
    model = adapted("distilbert", torch.bfloat16)
    before = {n: p.dtype for n, p in model.named_parameters()}
    assert heads.keep_precise(model) == 2  # pre_classifier and classifier
    assert heads.keep_precise(model) == 0
    changed = {n for n, p in model.named_parameters() if p.dtype != before[n]}
    assert len(changed) == 4 and all("modules_to_save" in n for n in changed)
    batch = collate(written(5))
    assert model(**batch).logits.dtype == torch.float32
    swap.undo(model)  # the stock model runs with these heads too
    assert model(**batch).loss.isfinite()


def test_a_model_in_float32_keeps_its_heads():
    model = adapted("bert")
    assert heads.keep_precise(model) == 0
    assert not any(m._forward_pre_hooks for m in model.modules())
