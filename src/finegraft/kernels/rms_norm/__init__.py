"""RMS norm with a backward by hand: no float32 copy of the activations is kept.

What: y = w * x / rms(x) (arXiv:1910.07467). How: the stock composition's own arithmetic and casts
forward; only x, w and the [t, 1] factor are saved. Constraint: the weight's gradient is computed
whenever it is asked for. Trade-off: x is normalised again in backward, which is cheaper than
keeping it.

Shapes: ... leading, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "rms_norm"]


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return ``(weight + offset) * x / sqrt(mean(x**2) + eps)`` in the dtype of ``x``.

    Args:
        x: [..., d].
        weight: [d].
        eps: Added to the mean square.
        offset: 1.0 for families that store the weight around zero (Gemma).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in ``x`` and ``weight``."""
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps, offset)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        ctx.offset = offset
        wide.mul_(factor)
        if offset:
            return wide.mul_(weight.to(wide.dtype) + offset).to(x.dtype)
        return wide.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight, factor = ctx.saved_tensors
        normed = x.to(factor.dtype, copy=True).mul_(factor)
        d_weight = None
        if ctx.needs_input_grad[1]:
            flat = (dy * normed).reshape(-1, x.shape[-1])
            d_weight = flat.sum(0).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            scale = weight.to(factor.dtype) + ctx.offset
            g = dy.to(factor.dtype) * scale
            along = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(x.shape[-1])
            dx = g.addcmul_(normed, along, value=-1).mul_(factor).to(x.dtype)
        return dx, d_weight, None, None


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(5)
    for shape, offset in (((3, 7), 0.0), ((2, 5, 33), 0.0), ((1, 129), 1.0), ((11, 576), 0.0)):
        inputs = {
            "x": torch.randn(*shape, dtype=torch.float64, generator=generator) * 3,
            "weight": torch.rand(shape[-1], dtype=torch.float64, generator=generator) + 0.5,
            "eps": 1e-5,
            "offset": offset,
        }
        yield Case("x".join(map(str, shape)) + f"-offset{offset}", inputs, ("x", "weight"))


OP = Op(
    reference=reference,
    implementations={"saved": rms_norm},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
