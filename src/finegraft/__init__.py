"""finegraft: from raw rows to a deployed fine-tune you can trust, on the computer you have.

Importing this package changes nothing, sets nothing and imports no other library; each name below
is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import TaskType

    from finegraft.adapters import add_new_tokens
    from finegraft.adapters._configs import (
        AdapterConfig,
        BitFitConfig,
        IA3Config,
        LoRAConfig,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )
    from finegraft.classifier import FastClassifier
    from finegraft.core.errors import FinegraftError
    from finegraft.data.chat_templates import get_chat_template, standardize_sharegpt
    from finegraft.fast import FastLanguageModel, is_bfloat16_supported
    from finegraft.models.packaged import fetch as local_model
    from finegraft.models.quantize import prepare_model_for_kbit_training
    from finegraft.training.arguments import SFTConfig, TrainingArguments
    from finegraft.training.responses import train_on_responses_only
    from finegraft.training.sft import SFTTrainer
    from finegraft.training.trainer import Trainer

__version__ = "0.1.0"

_WHERE = {
    "FastClassifier": ("finegraft.classifier", "FastClassifier"),
    "AdapterConfig": ("finegraft.adapters._configs", "AdapterConfig"),
    "BitFitConfig": ("finegraft.adapters._configs", "BitFitConfig"),
    "FastLanguageModel": ("finegraft.fast", "FastLanguageModel"),
    "FinegraftError": ("finegraft.core.errors", "FinegraftError"),
    "IA3Config": ("finegraft.adapters._configs", "IA3Config"),
    "LoRAConfig": ("finegraft.adapters._configs", "LoRAConfig"),
    "LoraConfig": ("finegraft.adapters._configs", "LoraConfig"),
    "PrefixTuningConfig": ("finegraft.adapters._configs", "PrefixTuningConfig"),
    "PromptEncoderConfig": ("finegraft.adapters._configs", "PromptEncoderConfig"),
    "PromptTuningConfig": ("finegraft.adapters._configs", "PromptTuningConfig"),
    "SFTConfig": ("finegraft.training.arguments", "SFTConfig"),
    "SFTTrainer": ("finegraft.training.sft", "SFTTrainer"),
    "TaskType": ("peft", "TaskType"),
    "Trainer": ("finegraft.training.trainer", "Trainer"),
    "TrainingArguments": ("finegraft.training.arguments", "TrainingArguments"),
    "add_new_tokens": ("finegraft.adapters", "add_new_tokens"),
    "get_chat_template": ("finegraft.data.chat_templates", "get_chat_template"),
    "get_peft_model": ("finegraft.adapters._configs", "get_peft_model"),
    "is_bfloat16_supported": ("finegraft.fast", "is_bfloat16_supported"),
    "local_model": ("finegraft.models.packaged", "fetch"),
    "prepare_model_for_kbit_training": (
        "finegraft.models.quantize",
        "prepare_model_for_kbit_training",
    ),
    "standardize_sharegpt": ("finegraft.data.chat_templates", "standardize_sharegpt"),
    "train_on_responses_only": ("finegraft.training.responses", "train_on_responses_only"),
}

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "FastClassifier",
    "FastLanguageModel",
    "FinegraftError",
    "IA3Config",
    "LoRAConfig",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "SFTConfig",
    "SFTTrainer",
    "TaskType",
    "Trainer",
    "TrainingArguments",
    "__version__",
    "add_new_tokens",
    "get_chat_template",
    "get_peft_model",
    "is_bfloat16_supported",
    "local_model",
    "prepare_model_for_kbit_training",
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
