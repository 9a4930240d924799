"""What every tuning method exports as ``METHOD``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Method:
    """One way of tuning.

    Attributes:
        attach: ``attach(model, **settings)`` returns the model with a new, trainable adapter.
        accelerate: Swaps the adapter's layers inside a model to fast classes; returns how many.
        not_mergeable: Why the adapter cannot be merged into the base, or None when it can.
    """

    attach: Callable[..., nn.Module]
    accelerate: Callable[[nn.Module], int]
    not_mergeable: str | None
