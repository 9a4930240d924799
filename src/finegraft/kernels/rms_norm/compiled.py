"""RMS norm of ``x`` or of ``x + delta`` through the compiled loops; bfloat16, frozen weight.

Measured at 1,024 x 576 on two cores with AMX: 0.13 ms forward with the residual added, 0.14 ms
backward; torch's composition takes 0.6 ms each. Shapes: t rows, d hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from finegraft.kernels._loops import Kernel

_FORWARD, _BACKWARD = Kernel("rms_norm", "forward"), Kernel("rms_norm", "backward")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """See the contract in the package."""
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps, offset)
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract of ``add_rms_norm``."""
    total, y = _AddRmsNorm.apply(x, delta, weight, eps, offset)
    return total, y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> torch.Tensor:
        x = x.contiguous()
        _, y, factor = _forward(x, None, weight, eps, offset)
        ctx.save_for_backward(x, weight, factor)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _backward(grads[0], None, *ctx.saved_tensors, ctx.offset), None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, y, factor = _forward(x.contiguous(), delta.contiguous(), weight, eps, offset)
        ctx.save_for_backward(total, weight, factor)
        ctx.offset = offset
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_total, dy = grads
        dx = _backward(dy, d_total, *ctx.saved_tensors, ctx.offset)
        return dx, dx, None, None, None


def _forward(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d = x.shape[-1]
    rows = x.numel() // d
    total = x if delta is None else torch.empty_like(x)
    y, factor = torch.empty_like(x), torch.empty(rows)
    _FORWARD(x.numel(), x, delta, weight, total, y, factor, rows, d, float(eps), float(offset))
    return total, y, factor


def _backward(
    dy: torch.Tensor,
    d_total: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    offset: float,
) -> torch.Tensor:
    dx = torch.empty_like(total)
    d_total = None if d_total is None else d_total.contiguous()
    dy, d = dy.contiguous(), total.shape[-1]
    rows = factor.shape[0]
    _BACKWARD(dy.numel(), dy, d_total, total, weight, factor, dx, rows, d, float(offset))
    return dx
