"""Gated activation silu(gate) * up, saving only its two inputs.

How: torch's own fused silu and its backward, written into buffers that exist already. Trade-off:
silu(gate) is computed again in backward instead of being kept.

Source: SwiGLU, arXiv:2002.05202. Shapes: gate and up are equal, any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "swiglu"]


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``."""
    return F.silu(gate) * up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in both inputs."""
    out: torch.Tensor = _SwiGlu.apply(gate, up)
    return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (dh,) = grads
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(dh * up, gate)
        return d_gate, F.silu(gate).mul_(dh)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(6)
    for shape in ((1,), (3, 7), (2, 5, 33), (17, 1536)):
        inputs = {
            name: torch.randn(*shape, dtype=torch.float64, generator=generator) * 2
            for name in ("gate", "up")
        }
        yield Case("x".join(map(str, shape)), inputs, ("gate", "up"))


OP = Op(
    reference=reference,
    implementations={"saved": swiglu},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
