"""Tiny classifiers on the disk, and rows in which one word says the class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from training_tiny import WORDS, tokenizer
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

_SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
_COMMON = {"vocab_size": 640, "num_attention_heads": 4, "pad_token_id": 0}
_DISTIL = {"vocab_size": 640, "dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4}


def base(folder: Path, kind: str = "bert") -> Path:
    """Save a random base without a classification head, with the tests' tokenizer."""
    torch.manual_seed(0)
    made = {
        "bert": lambda: BertModel(BertConfig(**_SIZES, **_COMMON, max_position_embeddings=96)),
        "distilbert": lambda: DistilBertModel(
            DistilBertConfig(**_DISTIL, pad_token_id=0, max_position_embeddings=96)
        ),
        "roberta": lambda: RobertaModel(
            RobertaConfig(**_SIZES, **_COMMON, max_position_embeddings=97)
        ),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(**_SIZES, **_COMMON, num_key_value_heads=2, eos_token_id=2)
        ),
    }[kind]()
    made.save_pretrained(folder)
    words = tokenizer()
    words.pad_token = "<|endoftext|>"
    words.save_pretrained(folder)
    return folder


def rows(count: int = 48, names: tuple[Any, ...] = ("cold", "warm")) -> list[dict[str, Any]]:
    """Rows whose first word, bye or hello, says the class; the rest makes each text another."""
    out = []
    for i in range(count):
        words = (
            ["bye", "hello"][i % 2],
            *(WORDS[(i * 7 + j * (1 + i // 10)) % 10] for j in range(5)),
        )
        out.append({"text": " ".join([*words, str(i)]), "label": names[i % 2]})
    return out


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path
