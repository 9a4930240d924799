"""Gated activations in Triton, on the stacked output of the gate and up projections.

What: act(gate) * up for SiLU, and for the tanh form of GELU (``kernels/geglu``). How: both are
``g * sigmoid(k(g))``, with k(g) = g for SiLU and k(g) = 2 sqrt(2/pi) (g + 0.044715 g**3) for GELU,
since (1 + tanh u) / 2 = sigmoid(2 u); one pair of kernels serves both. Only the inputs are saved,
and their gradients are one tensor. Constraint: the gate is the first half. Trade-off:
the activation is computed again in backward, which memory-bound kernels do for nothing.

Source: SwiGLU and GEGLU, https://arxiv.org/abs/2002.05202; GELU, https://arxiv.org/abs/1606.08415.
Shapes: n rows, f features of one half.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from finegraft.kernels import _gpu

__all__ = ["gated", "swiglu"]

# 8 elements a thread on 4 warps, one vector load of 16 bytes in 16-bit dtypes from each half.
_COLUMNS = 1024


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``silu(gate) * up``.

    Args:
        gate: [..., f], float32, bfloat16 or float16, leading dimensions of any strides. Without
            ``up``: [..., 2f], the output of a stacked product with the gate first.
        up: [..., f], of strides of its own.

    Returns:
        [..., f], contiguous, differentiable once.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002, an
            odd width, or a gate and an up that do not belong together.

    Source:
        https://arxiv.org/abs/2002.05202
    """
    return gated("swiglu", gate, up, gelu=False)


def gated(op: str, gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """Return the gated activation: the tanh form of GELU if ``gelu``, else SiLU."""
    if up is None:
        _gpu.require(op, gate)
        width = gate.shape[-1]
        _gpu.require_shape(op, width % 2 == 0 < width, f"width {width}", "an even width")
    else:
        _gpu.require(op, gate, up)
        _gpu.require_shape(
            op,
            gate.shape == up.shape and gate.dtype == up.dtype and gate.shape[-1] > 0,
            f"gate is {tuple(gate.shape)} in {gate.dtype}, up {tuple(up.shape)} in {up.dtype}",
            "one shape and one dtype for both",
        )
    out: torch.Tensor = _Gated.apply(gate, up, gelu)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
        ctx.gelu, ctx.shape, ctx.stacked = gelu, gate.shape, up is None
        g, u = _gpu.rows(gate).chunk(2, -1) if up is None else (_gpu.rows(gate), _gpu.rows(up))
        n, f = g.shape
        out = g.new_empty(n, f)
        if n:
            columns = min(_gpu.power_of_2(f), _COLUMNS)
            with torch.cuda.device_of(g):
                _forward_kernel[(n, _gpu.ceil_div(f, columns))](
                    g, u, out, f, g.stride(0), u.stride(0),
                    GELU=gelu, COLUMNS=columns, num_warps=4, **_gpu.COMPILER,
                )  # fmt: skip
        ctx.save_for_backward(g, u)
        return out.view(*gate.shape[:-1], f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dh = _gpu.rows(grads[0])
        g, u = ctx.saved_tensors
        n, f = g.shape
        both = g.new_empty(n, 2 * f)
        if n:
            columns = min(_gpu.power_of_2(f), _COLUMNS)
            with torch.cuda.device_of(g):
                _backward_kernel[(n, _gpu.ceil_div(f, columns))](
                    g, u, dh, both, f, g.stride(0), u.stride(0), dh.stride(0),
                    GELU=ctx.gelu, COLUMNS=columns, num_warps=4, **_gpu.COMPILER,
                )  # fmt: skip
        if ctx.stacked:
            return both.view(ctx.shape), None, None
        # Columns of one tensor, so that a product over both needs no copy.
        d_gate, d_up = (half.view(ctx.shape) for half in both.chunk(2, -1))
        return d_gate, d_up, None


@triton.jit
def _inner(g, GELU: tl.constexpr):
    """k(g) of the module's docstring; 1.5957691 is 2 sqrt(2/pi)."""
    if GELU:
        return 1.5957691216057308 * (g + 0.044715 * g * g * g)
    else:
        return g


@triton.jit
def _inner_slope(g, GELU: tl.constexpr):
    if GELU:
        return 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        return tl.full(g.shape, 1.0, tl.float32)


@triton.jit
def _forward_kernel(
    gate, up, out, f, gate_stride, up_stride, GELU: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = col < f
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    h = g * tl.sigmoid(_inner(g, GELU)) * u
    tl.store(out + row * f + col, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gate, up, dh, both, f, gate_stride, up_stride, dh_stride,
    GELU: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = col < f
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * dh_stride + col, mask=inside, other=0.0).to(tl.float32)
    k = _inner(g, GELU)
    s = tl.sigmoid(k)
    # sigmoid(-k) is 1 - s without the cancellation at large gates.
    slope = s + g * s * tl.sigmoid(-k) * _inner_slope(g, GELU)
    to = both + row * (2 * f) + col
    tl.store(to, (d * u * slope).to(both.dtype.element_ty), mask=inside)
    tl.store(to + f, (d * g * s).to(both.dtype.element_ty), mask=inside)
