"""Rotary position embedding in Triton: one read, one write, backward the opposite angle.

How: a program takes one token and a block of its heads; cos and sin are read once for all of them.
Constraint: the first ``2 * cos.shape[-1]`` features of a head are rotated in half-split pairs, the
rest is copied by the same program. Trade-off: out of place, so that x may still be needed by
whoever made it.

Source: RoFormer, https://arxiv.org/abs/2104.09864. Shapes: t tokens, h heads, f features of a
head, r half of the rotated features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from finegraft.kernels import _gpu

__all__ = ["rotary"]

# Pairs of one program: 16 a thread on 4 warps, which is 32 heads of 128 features.
_PAIRS = 2048


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return ``x`` rotated.

    Args:
        x: [t, h, f], float32, bfloat16 or float16; any strides of tokens and heads, so that a
            slice of a stacked q/k/v product needs no copy.
        cos: [t, r], of the angle of each pair of features.
        sin: [t, r].

    Returns:
        [t, h, f], contiguous, differentiable once in ``x``; not in ``cos`` and ``sin``.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002,
            shapes that do not belong together, or a gradient asked for ``cos`` or ``sin``.

    Source:
        https://arxiv.org/abs/2104.09864
    """
    _gpu.require("rotary", x, cos, sin)
    _gpu.require_shape(
        "rotary",
        x.dim() == 3
        and cos.shape == sin.shape == (x.shape[0], cos.shape[-1])
        and 0 < 2 * cos.shape[-1] <= x.shape[-1],
        f"x is {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}",
        "[t, h, f] and twice [t, r] with 2 r <= f",
    )
    _gpu.require_shape(
        "rotary",
        not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)),
        "cos or sin asks for a gradient",
        "gradients of x only",
    )
    out: torch.Tensor = _Rotary.apply(x, cos, sin)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotate(grads[0], *ctx.saved_tensors, backward=True), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    t, h, f = x.shape
    r = cos.shape[-1]
    out = x.new_empty(t, h, f)
    pairs = _gpu.power_of_2(r)
    rest = _gpu.power_of_2(f - 2 * r) if f > 2 * r else 0
    heads = min(_gpu.power_of_2(h), max(_PAIRS // pairs, 1))
    if out.numel():
        with torch.cuda.device_of(x):
            _kernel[(t, _gpu.ceil_div(h, heads))](
                x, cos, sin, out, h, f, r, x.stride(0), x.stride(1), BACKWARD=backward,
                HEADS=heads, PAIRS=pairs, REST=rest,
                num_warps=_gpu.warps(heads * max(pairs, rest)), **_gpu.COMPILER,
            )  # fmt: skip
    return out


@triton.jit
def _kernel(
    x, cos, sin, out, h, f, r, token_stride, head_stride, BACKWARD: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
    c = tl.load(cos + token * r + pair, mask=pair < r, other=0.0).to(tl.float32)
    s = tl.load(sin + token * r + pair, mask=pair < r, other=0.0).to(tl.float32)
    if BACKWARD:
        s = -s
    source = x + token * token_stride + head * head_stride
    target = out + (token * h + head) * f
    inside = (head < h) & (pair < r)
    first = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + r + pair, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(target + pair, (first * c - second * s).to(kind), mask=inside)
    tl.store(target + r + pair, (second * c + first * s).to(kind), mask=inside)
    if REST > 0:
        at = 2 * r + tl.arange(0, REST)[None, :]
        left = (head < h) & (at < f)
        tl.store(target + at, tl.load(source + at, mask=left, other=0.0), mask=left)
