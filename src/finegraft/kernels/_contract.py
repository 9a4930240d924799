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
    """One operation: specification, implementations and contract.

    Attributes:
        reference: Plain torch; in float64 it is the truth.
        implementations: By name, each with the reference's signature.
        unsupported: Why inputs are refused, or None.
        mutates: Names of inputs that are written to.
        cases: Parity cases on odd shapes.
        stock: What transformers runs instead, whose error in the same precision is the yardstick;
            None where that is the reference's own composition.
    """

    reference: Callable[..., Any]
    implementations: Mapping[str, Callable[..., Any]]
    unsupported: Callable[..., str | None]
    mutates: tuple[str, ...]
    cases: Callable[[], Iterator[Case]]
    stock: Callable[..., Any] | None = None
