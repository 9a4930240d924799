"""Gated activation gelu(gate) * up with the tanh approximation, saving only its two inputs.

How: as ``swiglu``: one compiled pass each way on bfloat16 rows, torch's own gelu elsewhere.

Source: GEGLU, arXiv:2002.05202; the approximation, arXiv:1606.08415. Shapes: t rows, f features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from finegraft.kernels import _gated, _gpu
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "geglu", "reference"]

GELU = _gated.Activation(
    operation="geglu",
    forward=functools.partial(F.gelu, approximate="tanh"),
    backward=functools.partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``gelu(gate) * up``, gelu with the tanh approximation."""
    return F.gelu(gate, approximate="tanh") * up


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in both inputs."""
    on_gpu = _gpu.kernel("geglu", gate, up)
    if on_gpu is not None:
        return on_gpu(gate, up)
    return _gated.gated(gate, up, GELU)


def _composed(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _gated.gated(gate, up, GELU, compiled=False)


def _cases() -> Iterator[Case]:
    return _gated.cases(16)


OP = Op(
    reference=reference,
    implementations={"composed": _composed, "fastest": geglu},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
