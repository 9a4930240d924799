"""finegraft: from raw rows to a deployed fine-tune you can trust, on the computer you have.

Importing this package changes nothing, sets nothing and imports no other library; each name below
is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finegraft.core.errors import FinegraftError
    from finegraft.data.chat_templates import get_chat_template, standardize_sharegpt
    from finegraft.fast import FastLanguageModel, is_bfloat16_supported
    from finegraft.models.packaged import fetch as local_model
    from finegraft.training.arguments import SFTConfig, TrainingArguments
    from finegraft.training.responses import train_on_responses_only
    from finegraft.training.sft import SFTTrainer
    from finegraft.training.trainer import Trainer

__version__ = "0.1.0"

_WHERE = {
    "FastLanguageModel": ("finegraft.fast", "FastLanguageModel"),
    "FinegraftError": ("finegraft.core.errors", "FinegraftError"),
    "SFTConfig": ("finegraft.training.arguments", "SFTConfig"),
    "SFTTrainer": ("finegraft.training.sft", "SFTTrainer"),
    "Trainer": ("finegraft.training.trainer", "Trainer"),
    "TrainingArguments": ("finegraft.training.arguments", "TrainingArguments"),
    "get_chat_template": ("finegraft.data.chat_templates", "get_chat_template"),
    "is_bfloat16_supported": ("finegraft.fast", "is_bfloat16_supported"),
    "local_model": ("finegraft.models.packaged", "fetch"),
    "standardize_sharegpt": ("finegraft.data.chat_templates", "standardize_sharegpt"),
    "train_on_responses_only": ("finegraft.training.responses", "train_on_responses_only"),
}

__all__ = [
    "FastLanguageModel",
    "FinegraftError",
    "SFTConfig",
    "SFTTrainer",
    "Trainer",
    "TrainingArguments",
    "__version__",
    "get_chat_template",
    "is_bfloat16_supported",
    "local_model",
    "standardize_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'finegraft' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
