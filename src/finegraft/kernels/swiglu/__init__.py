"""Gated activation silu(gate) * up, saving only its two inputs.

How: on bfloat16 rows one compiled pass forward and one backward, elsewhere torch's own silu and its
backward. The two gradients are columns of one tensor, so that a product over both needs no copy.
Trade-off: silu(gate) is computed again in backward instead of being kept.

Source: SwiGLU, arXiv:2002.05202. Shapes: t rows, f features; gate and up may be columns of one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from finegraft.kernels import _gated, _gpu
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "reference", "swiglu"]


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``."""
    return F.silu(gate) * up


SILU = _gated.Activation(
    operation="swiglu", forward=F.silu, backward=torch.ops.aten.silu_backward.default
)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in both inputs."""
    on_gpu = _gpu.kernel("swiglu", gate, up)
    if on_gpu is not None:
        return on_gpu(gate, up)
    return _gated.gated(gate, up, SILU)


def _composed(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _gated.gated(gate, up, SILU, compiled=False)


def _cases() -> Iterator[Case]:
    return _gated.cases(6)


OP = Op(
    reference=reference,
    implementations={"composed": _composed, "fastest": swiglu},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
