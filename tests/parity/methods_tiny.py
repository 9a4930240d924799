"""Tiny bases on the disk, and one method on one of them, trained: what ``test_methods`` looks at.

``reopened`` goes through the front doors, ``base`` and ``attached`` through the layer below them,
which leaves the family's modules stock: only so can a fresh adapter be compared with its base to
the bit, because fused modules round at other places.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from finegraft import (
    FastClassifier,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    TrainingArguments,
    adapters,
    opening,
)
from finegraft.adapters import _lora_start
from finegraft.data.labels import CLASSES
from finegraft.models import families, swap
from finegraft.models.families import FAMILIES
from finegraft.training.classifier import ClassifierTrainer, loss_of

STEPS, SAVED = 3, 2
NAMES = ("cold", "mild", "warm")
IDS = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 30, 4, 0], [4, 19, 3, 0, 0, 0]])
MASK = (IDS != 0).long()
_WRAPPERS = {"base_layer", "original_module", "token_adapter", "base_model"}
# Wide enough for whole blocks of 64 at 4 bits, with biases for the method that trains them.
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "attention_bias": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One method, one base, one task, 32 or 4 bits a weight."""

    method: str
    family: str
    task: str
    bits: int

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-{self.task}-{self.bits}bit"

    @property
    def causal(self) -> bool:
        return self.task == "causal"

    @property
    def starts_from_weights(self) -> bool:
        """Whether a fresh adapter is two parts that cancel each other, but for rounding."""
        return _lora_start.doubles(adapters.find(self.method)[1].get("init_lora_weights", True))

    @property
    def found(self) -> adapters.Method:
        return adapters.find(self.method)[0]


def tokenizer() -> Any:
    """A word is a token: ``w3`` is 3; the unknown word is 3 too."""
    words = {f"w{i}": i for i in range(131)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **special)


def save_base(family: str, folder: Path) -> None:
    """Random weights, no classification head."""
    tiny = FAMILIES.get(family).tiny()
    known = tiny.config.to_dict()
    shape = {name: value for name, value in _SHAPE.items() if name in known}
    torch.manual_seed(0)
    model = type(tiny)(type(tiny.config)(**{**known, **shape}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    inside = model.base_model if "Classification" in type(tiny).__name__ else model
    inside.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def base(case: Case, path: Path, trainable: bool = True) -> Any:
    """A base or an adapter on its base, in eval mode."""
    task = "causal" if case.causal else "sequence-classification"
    labels = {} if case.causal else {"id2label": dict(enumerate(NAMES))}
    if not case.causal:
        labels["label2id"] = {name: i for i, name in enumerate(NAMES)}
    opened = opening.open_model(
        path, trainable=trainable, dtype="float32", load_in_4bit=case.bits == 4, task=task, **labels
    )
    return opened.model.eval()


def attached(case: Case, path: Path) -> Any:
    """The base with a fresh adapter."""
    model = base(case, path)
    torch.manual_seed(3)
    return adapters.attach(model, case.method)


def reopened(case: Case, path: Path) -> tuple[Any, Any]:
    """The same as people open it, with fast modules."""
    how = {"dtype": "float32", "load_in_4bit": case.bits == 4}
    if not case.causal:
        model, words = FastClassifier.from_pretrained(str(path), **how)
    else:
        model, words = FastLanguageModel.from_pretrained(str(path), max_seq_length=None, **how)
        families.apply(model)
    return model.eval(), words


def logits(model: nn.Module, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK) -> Any:
    """Of the rows; of the places that hold a token, for a causal model."""
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask).logits
    if out.dim() == 2:
        return out
    return out[:, -ids.shape[1] :][mask.bool()]  # virtual tokens have logits of their own


def rows(case: Case) -> Dataset:
    """Eight ragged rows."""
    made = []
    for i in range(8):
        text = " ".join(f"w{4 + (i * 7 + j * 3) % 120}" for j in range(3 + i % 5))
        answer = " ".join(f"w{4 + (i * 5 + j) % 120}" for j in range(2 + i % 3))
        made.append({"prompt": text, "completion": f" {answer}"} if case.causal else text)
    if case.causal:
        return Dataset.from_list(made)
    return Dataset.from_dict({**tokenizer()(made), "labels": [i % 3 for i in range(8)]})


def trainer(case: Case, model: Any, folder: Path, **changes: Any) -> Any:
    """Ours for the task; three steps, a checkpoint after the second."""
    how = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 5,
    }
    given = {"model": model, "train_dataset": rows(case), "processing_class": tokenizer()}
    if case.causal:
        return SFTTrainer(args=SFTConfig(**{**how, "max_length": 64, **changes}), **given)
    return ClassifierTrainer(
        args=TrainingArguments(**{**how, **changes}),
        data_collator=DataCollatorWithPadding(tokenizer(), pad_to_multiple_of=8),
        compute_loss_func=loss_of(CLASSES),
        **given,
    )


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base's tensors inside a model, by the names that they had without adapters."""
    out = {}
    for name, value in swap.core(model).state_dict().items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if isinstance(value, torch.Tensor):
            out[".".join(parts)] = value.clone()
    return out


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what trains, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Run:
    """One case: what its base and its fresh adapter said, and the model after three steps."""

    def __init__(self, case: Case, base_path: Path, folder: Path):
        self.case, self.base_path, self.folder = case, base_path, folder
        bare = base(case, base_path)
        self.base_logits, self.before = logits(bare), plain(bare)
        model = attached(case, base_path)
        self.fresh_logits, self.start = logits(model), trained(model)
        self.trainer = trainer(case, model, folder / "run")
        self.trainer.train()
        self.model = self.trainer.model.eval()
        self.adapter = folder / "adapter"
        self.trainer.save_model(str(self.adapter))


class PlainPeft:
    """A process that opens adapters with peft alone, or with our plug-in.

    It lives as long as the tests: starting one takes longer than everything that it does.
    """

    def __init__(self, plugin: bool):
        script = str(Path(__file__).with_name("plain_peft.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, *(["--plugin"] if plugin else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def logits(self, case: Case, base_path: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
        """What it says of unpadded rows."""
        out = adapter / "plain.pt"
        asked = {
            "base": str(base_path),
            "adapter": str(adapter),
            "labels": 0 if case.causal else len(NAMES),
            "four_bit": case.bits == 4,
            "ids": ids.tolist(),
            "out": str(out),
        }
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # libraries may print before the answer
            if line.startswith("ANSWER "):
                assert line == "ANSWER ok\n", line
                return torch.load(out)
        raise AssertionError("the process with plain peft ended")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
