"""Swap module instances to fast classes, show it, and undo it.

What: a fast class is a subclass of the stock class with an attribute ``stock_class``; a swap sets
``module.__class__`` on one instance. How: parameters, buffers, hooks and state-dict keys stay
where they are, so undoing is setting the class back. Constraint: no library class is ever touched;
another model of the same family stays stock. Trade-off: an instance whose forward somebody has
replaced (accelerate's hooks) must be swapped before that, and is refused otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_REFUSED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Swapped:
    """One row of the report: a module that was swapped, or the reason why it was not."""

    module: str
    stock: str
    fast: str | None
    reason: str | None


def core(model: nn.Module) -> Any:
    """The model itself, or what peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> Any:
    """The stack of layers inside ``core(model)``, or the core where it names none."""
    inside = core(model)
    return getattr(inside, getattr(inside, "base_model_prefix", ""), inside)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module's library gave it."""
    found: type[nn.Module] = getattr(type(module), "stock_class", type(module))
    return found


@functools.cache
def fast_class(mixin: type, stock: type[nn.Module], shows_stock: bool = False) -> type[nn.Module]:
    """Return the fast class of ``stock`` whose methods come from ``mixin``.

    Args:
        shows_stock: ``forward`` shows the stock signature. Trainer reads it to find the arguments
            and columns that a model takes.
    """
    body: dict[str, Any] = {"stock_class": stock, "__module__": mixin.__module__}
    if shows_stock:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
        body["forward"] = forward
    return type(f"Fast{stock.__name__}", (mixin, stock), body)


class SavesAsStock:
    """Mixed into fast classes of whole models."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Save under the stock class, whose name is what ``config.json`` must carry."""
        with stock(self):
            return self.save_pretrained(*args, **kwargs)


def is_swapped(module: nn.Module) -> bool:
    """Whether this instance runs a fast class."""
    return hasattr(type(module), "stock_class")


def swap(module: nn.Module, fast: type[nn.Module]) -> bool:
    """Give ``module`` the class ``fast``; return False, with the reason recorded, if refused.

    Args:
        fast: A subclass of the module's class that names it as ``stock_class``.
    """
    if is_swapped(module):
        return True
    if "forward" in vars(module):
        refuse(module, "its forward was replaced on the instance")
        return False
    _REFUSED.pop(module, None)
    module.__class__ = fast
    return True


def refuse(module: nn.Module, reason: str) -> None:
    """Record why ``module`` stays stock, for the report."""
    _REFUSED[module] = reason


def undo(model: nn.Module) -> int:
    """Give every swapped module its stock class back; return how many there were."""
    count = 0
    for module in model.modules():
        if is_swapped(module):
            module.__class__ = stock_class(module)
            count += 1
    return count


@contextlib.contextmanager
def stock(module: nn.Module) -> Iterator[None]:
    """Run the block with this one instance under its stock class."""
    fast = type(module)
    module.__class__ = stock_class(module)
    try:
        yield
    finally:
        module.__class__ = fast


def report(model: nn.Module) -> list[Swapped]:
    """List every module that was swapped or refused, in the model's own order."""
    rows = []
    for name, module in model.named_modules():
        if is_swapped(module):
            rows.append(Swapped(name, stock_class(module).__name__, type(module).__name__, None))
        elif module in _REFUSED:
            rows.append(Swapped(name, type(module).__name__, None, _REFUSED[module]))
    return rows


def summary(model: nn.Module) -> str:
    """The report folded into one line: counts by class, and reasons."""
    counts: dict[str, int] = {}
    for row in report(model):
        key = row.fast or f"{row.stock} left as it is ({row.reason})"
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{count} x {key}" for key, count in counts.items()) or "no module swapped"
