"""One contender of ``cpu_classify`` in a process of its own.

What: trains a classifier with a real trainer, either a step at a time when told to, or to the end,
and then scores held-out rows. Constraint: while it waits it uses no processor time. The protocol is
that of ``_worker``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _worker


def rows(job: dict, padding: bool) -> list[dict[str, Any]]:
    """Tokenized training rows; with ``padding`` all of 512 tokens, as the document has it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    made = tokenizer(
        [row["text"] for row in job["train"]],
        truncation=True,
        max_length=512,
        padding="max_length" if padding else False,
    )
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for ids, mask, row in zip(
            made["input_ids"], made["attention_mask"], job["train"], strict=True
        )
    ]


def model(job: dict, dtype: str) -> Any:
    """The encoder with a new head and the document's LoRA, the same for every contender."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(job["seed"])
    made = AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=2, dtype="float32"
    )
    made = made.to(getattr(torch, dtype))  # so that the new head starts the same in all
    settings = LoraConfig(
        task_type="SEQ_CLS", r=1, lora_alpha=32, lora_dropout=0.01, target_modules=["query"]
    )
    return get_peft_model(made, settings)


def settings(job: dict, batch: int, rate: float) -> dict[str, Any]:
    """Training arguments that are the same for every contender, but for batch and rate."""
    length = {"max_steps": job["steps"]} if job["turns"] else {"num_train_epochs": job["epochs"]}
    return {
        **length,
        "output_dir": job["folder"],
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "weight_decay": 0.01,
        "seed": job["seed"],
        "logging_steps": _worker.NEVER,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def train(job: dict, trainer: type, args: Any, model: Any, padding: bool, turns: Any) -> Any:
    from transformers import AutoTokenizer, DataCollatorWithPadding

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    made = trainer(
        model=model,
        args=args,
        train_dataset=rows(job, padding),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_worker.callback(turns)] if job["turns"] else [],
    )
    made.train()
    return made.model


def run_document(job: dict, turns: Any) -> Any:
    """The seed document's recipe: every row padded to 512 tokens, float32, batches of 4."""
    import transformers

    own = {**job, "steps": -(-job["steps"] // job["every"])}  # it gets fewer turns
    args = transformers.TrainingArguments(**settings(own, 4, 1e-3))
    return train(job, transformers.Trainer, args, model(job, "float32"), True, turns)


def run_tuned(job: dict, turns: Any, dtype: str) -> Any:
    """The fastest stock settings: bf16, padding to a batch's longest row, rows of like length."""
    import transformers

    args = transformers.TrainingArguments(
        **settings(job, job["batch"], job["learning_rate"]),
        bf16=dtype == "float32",  # autocast above float32 weights, nothing above bfloat16 ones
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
    )
    return train(job, transformers.Trainer, args, model(job, dtype), False, turns)


def run_finegraft(job: dict, turns: Any, keep_memory: bool) -> Any:
    import finegraft
    from finegraft.core.process import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    args = finegraft.TrainingArguments(
        **settings(job, job["batch"], job["learning_rate"]),
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
    )
    return train(job, finegraft.Trainer, args, model(job, "bfloat16"), False, turns)


CONTENDERS = {
    "document": run_document,
    "tuned-bf16": lambda job, turns: run_tuned(job, turns, "bfloat16"),
    "tuned-autocast": lambda job, turns: run_tuned(job, turns, "float32"),
    "finegraft": lambda job, turns: run_finegraft(job, turns, False),
    "finegraft-keep": lambda job, turns: run_finegraft(job, turns, True),
}


def score(trained: Any, job: dict) -> dict[str, float]:
    """Loss and accuracy of held-out rows, 32 at a time in order of length."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    held = sorted(job["heldout"], key=lambda row: len(row["text"]))
    loss, right = 0.0, 0
    trained.eval()
    with torch.inference_mode():
        for at in range(0, len(held), 32):
            part = held[at : at + 32]
            batch = tokenizer([r["text"] for r in part], padding=True, return_tensors="pt")
            batch.pop("token_type_ids", None)
            logits = trained(**batch).logits.float()
            labels = torch.tensor([row["label"] for row in part])
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
    return {"heldout_loss": loss / len(held), "accuracy": right / len(held)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("job")
    chosen = parser.parse_args()
    with open(chosen.job, encoding="utf-8") as file:
        job = {**json.load(file), "folder": os.path.dirname(chosen.job)}
    import torch

    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    trained = CONTENDERS[chosen.contender](job, _worker.Turns())
    seconds = time.perf_counter() - started
    found = {} if job["turns"] else score(trained, job)
    _worker.say(event="score", seconds=seconds, **found)


if __name__ == "__main__":
    # Libraries print to stdout as they like; the protocol has a descriptor of its own.
    _worker.OUT = os.dup(1)
    os.dup2(2, 1)
    main()
