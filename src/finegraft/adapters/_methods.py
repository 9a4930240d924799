"""Attach a method by its name, and tell which one a model carries.

What: ``METHODS`` lists the files of this folder that do not begin with an underscore; a variant
(DoRA, say) is a name with settings that its method declares. Constraint: what a method cannot do
with this model (a quantized base, this task) is refused before anything is changed.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from finegraft.adapters._contract import CAUSAL, Method
from finegraft.adapters._task import task_named, task_of
from finegraft.adapters._tokens import train_new_rows
from finegraft.core.arguments import translate
from finegraft.core.errors import AdapterError, did_you_mean
from finegraft.core.registry import Registry
from finegraft.models import swap
from finegraft.models.classifier import new_modules

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
    model: nn.Module, name: str = "lora", *, task_type: str | None = None, **settings: Any
) -> nn.Module:
    """Return ``model`` with a new adapter of the method ``name``; only the adapter trains.

    Args:
        name: One of ``names()``.
        task_type: ``CAUSAL_LM``, ``SEQ_CLS`` or ``TOKEN_CLS``; None: what the model's class is for.
        settings: The method's own; they win over those of a variant.

    Raises:
        AdapterError: FG-ADAPT-010 unknown name, FG-ADAPT-011 not for this task, FG-ADAPT-012 not
            on a quantized base, FG-ADAPT-042 a model without a task, FG-ADAPT-045 a model that
            carries an adapter; and those of the method.
        ArgumentError: FG-ARG-001, a setting that the method does not have.
    """
    method, preset = find(name)
    task_type = task_named(task_type) or task_of(model)
    check(model, name, task_type)
    check_bare(model)
    parameters = inspect.signature(method.attach).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        translate(f"method '{name}'", settings, set(parameters) - {"model"}, {})
    new = new_modules(model) if task_type != CAUSAL and method.saves_modules else []
    if new:  # a pooler that the checkpoint lacks would be another one after every loading
        settings["modules_to_save"] = [*(settings.get("modules_to_save") or ()), *new]
    wrapped = method.attach(model, task_type=task_type, **{**preset, **settings})
    train_new_rows(wrapped, settings.get("adapter_name"))
    return wrapped


def check(model: nn.Module, name: str, task_type: str) -> None:
    """Prove that the method ``name`` can be used on ``model`` for this task.

    Raises:
        AdapterError: FG-ADAPT-010 to FG-ADAPT-012, as for ``attach``.
    """
    method, _ = find(name)
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


def check_bare(model: nn.Module) -> None:
    """Prove that ``model`` carries no adapter.

    Raises:
        AdapterError: FG-ADAPT-045.
    """
    if hasattr(model, "get_base_model"):
        carried = getattr(model, "peft_config", None) or {}
        raise AdapterError(
            "FG-ADAPT-045",
            f"the model carries an adapter already: {', '.join(carried)}",
            allowed="a model without one",
            fix="adapters.named.add(model, name, ...) adds another; or load the base anew",
        )


def accelerate(model: nn.Module) -> int:
    """Swap the adapter layers of every method inside ``model``; return how many are fast."""
    return sum(method.accelerate(model) for _, method in METHODS.items())


def method_of(model: nn.Module) -> Method | None:
    """The method of the model's active adapter; None for a model without one."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    active = active[0] if isinstance(active, list) else active
    name = name_of(configs.get(active))
    return None if name is None else METHODS.get(name)


def name_of(config: Any) -> str | None:
    """The name of the method that a peft configuration belongs to; None where none here does."""
    kind = getattr(config, "peft_type", None)
    kind = str(getattr(kind, "value", kind) or "").removeprefix("PeftType.")
    return next((n for n, m in METHODS.items() if m.peft_type and m.peft_type == kind), None)
