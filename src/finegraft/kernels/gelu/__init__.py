"""Exact GELU that keeps its derivative instead of its input.

What: y = x * Phi(x), Phi the normal distribution (arXiv:1606.08415, the exact form). How: in
bfloat16 one compiled pass writes y and dy/dx, which share their exponential, so that backward is a
product; else torch's own. Constraint: erf is good to 2e-7 in float32. Trade-off: the derivative is
rounded to bfloat16 before the product, 1.4 times torch's rounding error in the gradient.

800 x 1,536 numbers on one thread: torch takes 0.48 ms forward and 0.92 ms backward, this 0.84 and
0.38 ms.

Shapes: any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from finegraft.kernels import _loops
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "gelu"]

_FORWARD = _loops.Kernel("gelu", "forward")


def reference(x: torch.Tensor) -> torch.Tensor:
    """Return ``x * Phi(x)`` in the dtype of ``x``."""
    return F.gelu(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in ``x``."""
    plain = not (torch.is_grad_enabled() and x.requires_grad)
    if plain or _loops.refusal(x) is not None or not x.is_contiguous():
        return F.gelu(x)
    out: torch.Tensor = _Gelu.apply(x)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out, slope = torch.empty_like(x), torch.empty_like(x)
        _FORWARD(x.numel(), x, out, slope, x.numel())
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(16)
    for shape in ((1,), (3, 7), (2, 5, 33), (17, 1536)):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator) * 3
        yield Case("x".join(map(str, shape)), {"x": x}, ("x",))


OP = Op(
    reference=reference,
    implementations={"saved": gelu},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
