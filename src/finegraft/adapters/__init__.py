"""Tuning methods, one file each, found by name.

What: ``attach`` makes an adapter of any method, ``method_of`` tells which one a model carries. How:
the registry lists the files of this folder that do not begin with an underscore; a variant (DoRA,
say) is a name with settings that its method declares. Constraint: what a method cannot do with this
model (a quantized base, this task) is refused before anything is changed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from finegraft.adapters._contract import CAUSAL, SEQUENCE, TASKS, TOKEN, Method
from finegraft.core.errors import AdapterError, did_you_mean
from finegraft.core.registry import Registry
from finegraft.models import swap

__all__ = [
    "CAUSAL",
    "METHODS",
    "SEQUENCE",
    "TASKS",
    "TOKEN",
    "Method",
    "accelerate",
    "attach",
    "find",
    "method_of",
    "names",
]

METHODS: Registry[Method] = Registry("finegraft.adapters", "METHOD", "method")


def names() -> list[str]:
    """Every name that ``attach`` takes: methods and their variants."""
    return sorted(
        set(METHODS.names()) | {v for _, method in METHODS.items() for v in method.variants}
    )


def find(name: str) -> tuple[Method, dict[str, Any]]:
    """Return the method called ``name`` and the settings that the name stands for.

    Raises:
        AdapterError: FG-ADAPT-010, no such method.
    """
    if name in METHODS.names():
        return METHODS.get(name), {}
    for _, method in METHODS.items():
        if name in method.variants:
            return method, dict(method.variants[name])
    raise AdapterError(
        "FG-ADAPT-010",
        f"unknown method '{name}'",
        allowed=", ".join(names()),
        fix=did_you_mean(name, names()),
    )


def attach(
    model: nn.Module, name: str = "lora", *, task_type: str = CAUSAL, **settings: Any
) -> nn.Module:
    """Return ``model`` with a new adapter of the method ``name``; only the adapter trains.

    Args:
        name: One of ``names()``.
        task_type: ``CAUSAL_LM``, ``SEQ_CLS`` or ``TOKEN_CLS``.
        settings: The method's own; they win over those of a variant.

    Raises:
        AdapterError: FG-ADAPT-010 unknown name, FG-ADAPT-011 not for this task, FG-ADAPT-012 not
            on a quantized base; and those of the method.
    """
    method, preset = find(name)
    if task_type not in method.tasks:
        raise AdapterError(
            "FG-ADAPT-011",
            f"method '{name}' for the task {task_type}",
            allowed=f"for {name}: {', '.join(method.tasks)}",
            fix="method='lora' works for every task",
        )
    if method.not_quantized and getattr(swap.core(model), "is_quantized", False):
        raise AdapterError(
            "FG-ADAPT-012",
            f"method '{name}' on a quantized base: {method.not_quantized}",
            allowed="a 16-bit or 32-bit base",
            fix="load with load_in_4bit=False and load_in_8bit=False, or method='lora'",
        )
    return method.attach(model, task_type=task_type, **{**preset, **settings})


def accelerate(model: nn.Module) -> int:
    """Swap the adapter layers of every method inside ``model``; return how many are fast."""
    return sum(method.accelerate(model) for _, method in METHODS.items())


def method_of(model: nn.Module) -> Method | None:
    """The method of the model's active adapter; None for a model without one."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    active = active[0] if isinstance(active, list) else active
    config = configs.get(active)
    kind = str(getattr(config, "peft_type", "") or "").removeprefix("PeftType.")
    return next((m for _, m in METHODS.items() if m.peft_type and m.peft_type == kind), None)
