"""RMS norm in Triton: one pass over the row forward, one backward.

What: y = (w + offset) * x / rms(x), also of a sum x + delta. How: a program holds whole rows in
registers; forward keeps one float32 factor a row, backward reads x again. The weight's gradient is
summed in float32 by a fixed number of programs, each over its own rows, then once over their
partial sums: no atomics, so every run gives the same bits. Constraint: rows of at most 65,536
elements. Trade-off: all arithmetic is float32 with one rounding at the end, which is closer to the
exact result than the stock composition, not bit-equal to it.

Source: https://arxiv.org/abs/1910.07467. Shapes: n rows, d width, p programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from finegraft.kernels import _gpu

__all__ = ["backward", "forward", "rms_norm"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return ``(weight + offset) * x / sqrt(mean(x**2) + eps)`` in the dtype of ``x``.

    Args:
        x: [..., d], float32, bfloat16 or float16; leading dimensions of any strides.
        weight: [d].
        eps: Added to the mean square.
        offset: 1.0 for families that store the weight around zero (Gemma).

    Returns:
        [..., d], contiguous, differentiable once in ``x`` and ``weight``.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002,
            shapes that do not belong together.

    Source:
        https://arxiv.org/abs/1910.07467
    """
    require("rms_norm", x, weight)
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps, offset)
    return out


def require(op: str, x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> None:
    """Raise unless the norm of ``op`` can take these."""
    _gpu.require(op, x, weight, *others)
    d = x.shape[-1]
    _gpu.require_shape(
        op,
        weight.shape == (d,) and 0 < d <= _gpu.MAX_ROW,
        f"x is {tuple(x.shape)}, the weight {tuple(weight.shape)}",
        f"a weight as wide as x, at most {_gpu.MAX_ROW}",
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> torch.Tensor:
        flat, weight = _gpu.rows(x), weight.contiguous()
        _, out, factor = forward(flat, None, weight, eps, offset)
        ctx.save_for_backward(flat, weight, factor)
        ctx.offset = offset
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight, factor = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        dx, d_weight = backward(
            x, weight, factor, _gpu.rows(dy), None, ctx.offset, want_x, want_weight
        )
        return dx.view(dy.shape) if dx is not None else None, d_weight, None, None


def forward(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel.

    Args:
        x: [n, d], its last dimension dense.
        delta: [n, d] likewise, added to ``x`` first; None for nothing to add.
        weight: [d], dense.
        eps: Added to the mean square.
        offset: Added to the weight.

    Returns:
        The sum (``x`` itself without ``delta``) and the norm, [n, d]; the factor of each row in
        float32, [n].
    """
    n, d = x.shape
    total = x if delta is None else x.new_empty(n, d)
    out = x.new_empty(n, d)
    factor = x.new_empty(n, dtype=torch.float32)
    tile = _gpu.whole_rows(d)
    added = x if delta is None else delta
    if n:
        with torch.cuda.device_of(x):
            _forward_kernel[(_gpu.ceil_div(n, tile.rows),)](
                x, added, total, weight, out, factor, n, d, x.stride(0), added.stride(0),
                eps, offset, ADD=delta is not None, ROWS=tile.rows, COLUMNS=tile.columns,
                num_warps=tile.warps, **_gpu.COMPILER,
            )  # fmt: skip
    return total, out, factor


def backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    dy: torch.Tensor,
    d_total: torch.Tensor | None,
    offset: float,
    want_x: bool,
    want_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernel.

    Args:
        x: [n, d], what was normalised.
        weight: [d].
        factor: [n].
        dy: [n, d], gradient of the norm, its last dimension dense.
        d_total: [n, d] likewise, another gradient of ``x`` to add, or None.
        offset: Added to the weight.
        want_x: Whether the gradient of ``x`` is asked for.
        want_weight: Whether the gradient of the weight is.

    Returns:
        The gradients of ``x`` [n, d] and of the weight [d], None where not asked for.
    """
    n, d = x.shape
    tile = _gpu.whole_rows(d)
    tiles = _gpu.ceil_div(n, tile.rows)
    programs = _gpu.summing_programs(x.device, tiles) if want_weight else tiles
    dx = x.new_empty(n, d) if want_x else None
    partial = x.new_zeros(programs, d, dtype=torch.float32) if want_weight else None
    other = dy if d_total is None else d_total
    if n and (want_x or want_weight):
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                x, weight, factor, dy, other, dy if dx is None else dx,
                factor if partial is None else partial, n, d, tiles,
                x.stride(0), dy.stride(0), other.stride(0), offset,
                HAS_OTHER=d_total is not None, WANT_X=want_x, WANT_WEIGHT=want_weight,
                ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, **_gpu.COMPILER,
            )  # fmt: skip
    return dx, None if partial is None else partial.sum(0).to(weight.dtype)


@triton.jit
def _forward_kernel(
    x, delta, total, weight, out, factor, n, d, x_stride, delta_stride, eps, offset,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    col = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    inside = (row < n) & (col < d)
    value = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + col, mask=inside, other=0.0).to(tl.float32)
        # The norm sees the sum as the next layer will read it: rounded.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * d + col, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / d + eps)  # [ROWS, 1]
    tl.store(factor + row, scale, mask=row < n)
    w = tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32) + offset
    tl.store(out + row * d + col, (value * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, weight, factor, dy, other, dx, partial, n, d, tiles, x_stride, dy_stride, other_stride,
    offset, HAS_OTHER: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    w = tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32) + offset
    d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
        inside = (row < n) & (col < d)
        scale = tl.load(factor + row, mask=row < n, other=0.0)
        normed = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        if WANT_WEIGHT:
            d_weight += grad * normed
        if WANT_X:
            g = grad * w
            along = tl.sum(g * normed, 1, keep_dims=True) / d  # [ROWS, 1]
            result = (g - normed * along) * scale
            if HAS_OTHER:
                at = other + row * other_stride + col
                result += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + row * d + col, result.to(dx.dtype.element_ty), mask=inside)
    if WANT_WEIGHT:
        at = partial + tl.program_id(0).to(tl.int64) * d + col
        tl.store(at, tl.sum(d_weight, 0, keep_dims=True), mask=col < d)
