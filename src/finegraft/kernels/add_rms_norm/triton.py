"""Residual sum and RMS norm of it in one Triton kernel.

What: (x + delta, norm of the sum). How: the norm's own kernels with the sum as their input; the
backward adds the sum's gradient to the norm's before it writes. Constraint: x and delta have one
shape and dtype, so that both receive the same gradient tensor. Trade-off: as for the norm alone.

Saves one write and two reads of [n, d] beside the two operations one after the other.
Shapes: ... leading, d hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finegraft.kernels import _gpu
from finegraft.kernels.rms_norm import triton as norm

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + delta`` and ``rms_norm(x + delta)``, both in the dtype of ``x``.

    Args:
        x: [..., d], float32, bfloat16 or float16; leading dimensions of any strides.
        delta: As ``x``.
        weight: [d].
        eps: Added to the mean square.
        offset: Added to the weight.

    Returns:
        Two tensors [..., d], contiguous, differentiable once in ``x``, ``delta`` and ``weight``.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002,
            shapes or dtypes that do not belong together.

    Source:
        https://arxiv.org/abs/1910.07467
    """
    norm.require("add_rms_norm", x, weight, delta)
    _gpu.require_shape(
        "add_rms_norm",
        x.shape == delta.shape and x.dtype == delta.dtype,
        f"x is {tuple(x.shape)} in {x.dtype}, delta {tuple(delta.shape)} in {delta.dtype}",
        "one shape and one dtype for both",
    )
    total, out = _AddRmsNorm.apply(x, delta, weight, eps, offset)
    return total, out


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
        weight = weight.contiguous()
        total, out, factor = norm.forward(_gpu.rows(x), _gpu.rows(delta), weight, eps, offset)
        total = total.view(x.shape)
        ctx.save_for_backward(total, weight, factor)
        ctx.offset = offset
        # An output that nobody uses costs no tensor of zeros.
        ctx.set_materialize_grads(False)
        return total, out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        d_total, dy = grads
        total, weight, factor = ctx.saved_tensors
        want_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        want_weight = ctx.needs_input_grad[2]
        if dy is None:
            dx, d_weight = d_total, torch.zeros_like(weight) if want_weight else None
        else:
            dx, d_weight = norm.backward(
                _gpu.rows(total), weight, factor, _gpu.rows(dy),
                None if d_total is None else _gpu.rows(d_total),
                ctx.offset, want_x, want_weight,
            )  # fmt: skip
            dx = None if dx is None else dx.view(total.shape)
        d_x, d_delta = (dx if want else None for want in ctx.needs_input_grad[:2])
        return d_x, d_delta, d_weight, None, None
