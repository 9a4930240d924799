"""What every training task exports as ``TASK``, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainingArguments, set_seed

from finegraft import adapters
from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig, groups
from finegraft.training import trackers
from finegraft.training.events import EventLog


class Checked(Protocol):
    """Rows that were read and found good, before any weight is loaded."""

    record: dict[str, Any]
    tokenizer: Any


_ANY_METHOD = ("method", "method_settings", "full_finetuning")


@dataclass(frozen=True)
class Task:
    """One kind of training.

    Attributes:
        check: ``check(config, log)`` reads and checks the rows, loading no weights.
        build: ``build(config, checked)`` loads the model and returns the trainer.
    """

    check: Callable[[TrainConfig, EventLog], Any]
    build: Callable[[TrainConfig, Any], Any]


def adapted(config: TrainConfig, model: Any, task_type: str, *, has_adapter: bool) -> Any:
    """Return ``model`` with the configured method attached, its start drawn from the seed.

    Args:
        has_adapter: The model was opened from an adapter folder, whose adapter goes on training.
    """
    set_seed(config.seed)
    if config.trains_all:
        return adapters.attach(model, "full", task_type=task_type, **config.method_settings)
    if has_adapter:
        return model
    return adapters.attach(model, config.method, task_type=task_type, **settings(config))


def settings(config: TrainConfig) -> dict[str, Any]:
    """What the configured method is given: its own keys of the schema and ``method_settings``.

    Raises:
        ConfigError: FG-CONF-006, a key is set that this method does not have.
    """
    method, preset = adapters.find(config.method)
    ignored = [
        name
        for name in groups()["adapter"]
        if name not in {*method.keys, *_ANY_METHOD}
        and getattr(config, name) != TrainConfig.model_fields[name].default
    ]
    if ignored:
        raise ConfigError(
            "FG-CONF-006",
            f"{', '.join(ignored)} with method '{config.method}', which would ignore it",
            allowed=f"{', '.join(method.keys) or 'no such key'} here, the rest in method_settings",
            fix=f"remove {ignored[0]}, or put what the method takes into method_settings",
        )
    own = {name: getattr(config, name) for name in method.keys if name not in preset}
    return {**own, **config.method_settings}


_PRECISION = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")


def quantization(config: TrainConfig) -> dict[str, Any]:
    """Arguments of ``opening.open_model`` that say how the base is quantised.

    Raises:
        ConfigError: FG-MODEL-016, settings of 4-bit weights without 4-bit weights.
    """
    given = {name: getattr(config, name) for name in _PRECISION}
    changed = [n for n in _PRECISION if given[n] != TrainConfig.model_fields[n].default]
    if changed and not config.load_in_4bit:
        raise ConfigError(
            "FG-MODEL-016",
            f"{', '.join(changed)} without load_in_4bit, which would be ignored",
            allowed="with load_in_4bit only",
            fix=f"--load-in-4bit, or remove {changed[0]}",
        )
    return {"load_in_4bit": config.load_in_4bit, "load_in_8bit": config.load_in_8bit, **given}


def shared_arguments(config: TrainConfig, kind: type[TrainingArguments]) -> dict[str, Any]:
    """Settings that the schema and the trainer's arguments both have, under their one name."""
    # The schema's keys carry the trainer's own names: the shared ones are handed over unchanged.
    done_here = {"packing", "completion_only_loss", "eval_steps"}
    same = set(TrainConfig.model_fields) & {f.name for f in fields(kind)} - done_here
    return {
        "output_dir": str(Path(config.output) / "checkpoints"),
        "disable_tqdm": True,
        "save_strategy": "steps",
        "loraplus_lr_ratio": config.loraplus_lr_ratio,
        "logging_nan_inf_filter": False,  # a loss that is not a number is told as such
        **{name: getattr(config, name) for name in same},
        "report_to": trackers.names(config.report_to) or "none",
    }


def evaluation_arguments(config: TrainConfig, has_eval: bool) -> dict[str, Any]:
    """When to evaluate: every ``eval_steps``, else each epoch, never without held-out rows."""
    if not has_eval:
        return {"eval_strategy": "no"}
    if config.eval_steps:
        return {"eval_strategy": "steps", "eval_steps": config.eval_steps}
    return {"eval_strategy": "epoch"}
