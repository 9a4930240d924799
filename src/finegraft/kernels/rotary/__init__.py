"""Rotary position embedding on half-split heads, one pass, nothing but cos and sin saved.

How: the two halves are combined with addcmul into one new tensor; the backward is the rotation by
the opposite angle. Constraint: the first ``2 * cos.shape[-1]`` features of a head are rotated, the
rest (partial rotary families) is copied.

Source: RoFormer, arXiv:2104.09864. Shapes: t tokens, h heads, f features of a head, r half of the
rotated features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from finegraft.kernels import _gpu
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "one_half", "reference", "rotary", "rotate"]


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return ``x`` rotated.

    Args:
        x: [t, h, f].
        cos: [t, r], of the angle of each pair of features.
        sin: [t, r].
    """
    r = cos.shape[-1]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


def one_half(angles: torch.Tensor) -> torch.Tensor:
    """[t, r] of the [1, t, 2 r] that transformers makes, whose halves are the same."""
    return angles[0, :, : angles.shape[-1] // 2].contiguous()


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in ``x``."""
    on_gpu = _gpu.kernel("rotary", x, cos, sin)
    if on_gpu is not None:
        return on_gpu(x, cos, sin)
    out: torch.Tensor = _Rotary.apply(x, cos, sin)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Rotate by the angle (``sign`` 1) or back (-1), without recording a gradient."""
    r = cos.shape[-1]
    out = torch.empty_like(x)
    first, second = x[..., :r], x[..., r : 2 * r]
    c, s = cos[:, None], sin[:, None]
    torch.mul(first, c, out=out[..., :r]).addcmul_(second, s, value=-sign)
    torch.mul(second, c, out=out[..., r : 2 * r]).addcmul_(first, s, value=sign)
    if x.shape[-1] > 2 * r:
        out[..., 2 * r :] = x[..., 2 * r :]
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, -1), None, None


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(8)
    for t, h, f, r in ((1, 1, 2, 1), (7, 3, 8, 4), (13, 2, 10, 3), (31, 9, 64, 32)):
        angle = torch.rand(t, r, dtype=torch.float64, generator=generator) * 6
        x = torch.randn(t, h, f, dtype=torch.float64, generator=generator)
        inputs = {"x": x, "cos": angle.cos(), "sin": angle.sin()}
        yield Case(f"t{t}-h{h}-f{f}-r{r}", inputs, ("x",))


OP = Op(
    reference=reference,
    implementations={"saved": rotary},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
