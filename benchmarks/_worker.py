"""One contender in a process of its own, stepping only when told to.

What: trains with its own real trainer; before every optimizer step it reports and waits for a line
on stdin, so that contenders can take turns. Constraint: while it waits it uses no processor time.
Protocol: a JSON line on stdout per event; ``go`` on stdin lets one step run, ``score`` ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time

NEVER = 1_000_000


def say(**event: object) -> None:
    os.write(OUT, (json.dumps(event) + "\n").encode())


def wait() -> str:
    return sys.stdin.readline().strip()


def memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Turns:
    """Reports the step that ended and waits for the next turn."""

    def __init__(self) -> None:
        self.started: float | None = None

    def next(self) -> None:
        if self.started is not None:
            say(event="step", seconds=time.perf_counter() - self.started, memory=memory_bytes())
        else:
            say(event="ready")
        wait()
        self.started = time.perf_counter()


def callback(turns: Turns):
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.next()

        def on_train_end(self, args, state, control, **kwargs):
            turns.next()

    return TakeTurns()


def settings(job: dict) -> dict:
    """Hyper-parameters that are the same for every contender."""
    return {
        "output_dir": job["folder"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "seed": 11,
        "logging_steps": NEVER,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def lora_config(job: dict):
    from peft import LoraConfig

    return LoraConfig(
        r=job["r"], lora_alpha=job["r"], target_modules="all-linear", task_type="CAUSAL_LM"
    )


def stock_model(job: dict, dtype: str, four_bit: bool = False):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=dtype, quantization_config=quantized if four_bit else None
    )
    torch.manual_seed(11)
    return get_peft_model(model, lora_config(job))


def dataset(job: dict):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": job["input_ids"], "labels": job["labels"]})


def run_trl(job: dict, turns: Turns, dtype: str, four_bit: bool = False):
    import trl
    from transformers import AutoTokenizer

    trainer = trl.SFTTrainer(
        model=stock_model(job, dtype, four_bit),
        args=trl.SFTConfig(
            **settings(job),
            bf16=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[callback(turns)],
    )
    trainer.train()
    return trainer.model


def run_bare(job: dict, turns: Turns):
    """No trainer: peft, transformers' own loss and the optimizer in a loop."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model = stock_model(job, "bfloat16").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    order = torch.randperm(len(job["input_ids"]), generator=torch.Generator().manual_seed(11))
    for step in range(job["steps"]):
        turns.next()
        at = [int(order[(step * job["batch"] + i) % len(order)]) for i in range(job["batch"])]
        ids = pad_sequence([torch.tensor(job["input_ids"][i]) for i in at], batch_first=True)
        labels = pad_sequence(
            [torch.tensor(job["labels"][i]) for i in at], batch_first=True, padding_value=-100
        )
        lengths = torch.tensor([len(job["input_ids"][i]) for i in at])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    turns.next()
    return model


def run_finegraft(job: dict, turns: Turns, share_prefix: bool, four_bit: bool = False):
    import finegraft
    from finegraft.core.process import keep_freed_memory

    keep_freed_memory()  # as the command line does for its own process
    model, tokenizer = finegraft.FastLanguageModel.from_pretrained(
        job["model"], dtype="bfloat16", max_seq_length=None, load_in_4bit=four_bit
    )
    model = finegraft.FastLanguageModel.get_peft_model(
        model, r=job["r"], lora_alpha=job["r"], random_state=11
    )
    trainer = finegraft.SFTTrainer(
        model=model,
        args=finegraft.SFTConfig(**settings(job), share_prefix=share_prefix),
        train_dataset=dataset(job),
        processing_class=tokenizer,
        callbacks=[callback(turns)],
    )
    trainer.train()
    return trainer.model


CONTENDERS = {
    "trl-float32": lambda job, turns: run_trl(job, turns, "float32"),
    "trl-bf16": lambda job, turns: run_trl(job, turns, "bfloat16"),
    "peft-bare-bf16": run_bare,
    "finegraft": lambda job, turns: run_finegraft(job, turns, False),
    "finegraft-shared": lambda job, turns: run_finegraft(job, turns, True),
    "trl-4bit": lambda job, turns: run_trl(job, turns, "bfloat16", four_bit=True),
    "finegraft-4bit": lambda job, turns: run_finegraft(job, turns, False, four_bit=True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("job")
    chosen = parser.parse_args()
    with open(chosen.job, encoding="utf-8") as file:
        job = {**json.load(file), "folder": os.path.dirname(chosen.job)}
    import torch

    torch.set_num_threads(job["threads"])
    model = CONTENDERS[chosen.contender](job, Turns())
    from finegraft.inference.score import heldout_loss

    loss = heldout_loss(model, job["heldout_ids"], job["heldout_labels"], batch_size=16)
    say(event="score", heldout_loss=loss)


if __name__ == "__main__":
    # Libraries print to stdout as they like; the protocol has a descriptor of its own.
    OUT = os.dup(1)
    os.dup2(2, 1)
    main()
