"""RMS norm of ``x`` or of ``x + delta`` out of torch's operations, any dtype and device.

How: the stock composition's own arithmetic and casts forward. Shapes: ... leading, d hidden.
"""

from __future__ import annotations

from typing import Any

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """See the contract in the package."""
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
