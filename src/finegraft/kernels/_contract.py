"""What every kernel promises.

What: one frozen record per operation: the plain-torch reference, the implementations by name, why
an input is refused, what is mutated, and the shapes that its parity test runs. Constraint: the
reference has the same signature as every implementation and is the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One parity case: keyword tensors and settings for the operation.

    Attributes:
        label: Shapes in words, for the test's name.
        inputs: Arguments in float64; floating tensors listed in ``grads`` are differentiated.
        grads: Names of the inputs whose gradients are compared.
    """

    label: str
    inputs: Mapping[str, Any]
    grads: tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """One operation: specification, implementations and contract."""

    reference: Callable[..., Any]
    implementations: Mapping[str, Callable[..., Any]]
    unsupported: Callable[..., str | None]
    mutates: tuple[str, ...]
    cases: Callable[[], Iterator[Case]]
