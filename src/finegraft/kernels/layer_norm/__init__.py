"""Layer norm, also of a residual plus a dropped-out branch, saving only what backward needs.

What: y = w * z / std(z) + b with z = x, or z = residual + dropout(x) (arXiv:1607.06450). How: one
compiled pass each way in bfloat16, else torch's own norm around one fused multiply-add; z, two
numbers a row and the random bits are kept. Constraint: gradients of x, residual, weight and bias,
each computed only where it is asked for. Trade-off: the bits (2 bytes an element) are kept instead
of a mask of x's dtype.

Shapes: ... leading, t rows, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from finegraft.kernels import _loops
from finegraft.kernels import dropout as drop
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "layer_norm"]

_FORWARD = _loops.Kernel("layer_norm", "forward")
_BACKWARD = _loops.Kernel("layer_norm", "backward")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """Return the layer norm of ``x``, or of ``residual`` plus ``x`` after dropout.

    Args:
        x: [..., d].
        weight: [d].
        bias: [d].
        eps: Added to the variance.
        residual: [..., d] or None.
        noise: int16 [..., d] as ``dropout.draw`` gives, or None: nothing is dropped.
        p: Probability of dropping an element of ``x``.

    Returns:
        [..., d] in the wider dtype of ``x`` and ``residual``.
    """
    total = x if noise is None else drop.reference(x, noise, p)
    if residual is not None:
        total = total + residual
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in x, weight, bias and residual."""
    out: torch.Tensor = _LayerNorm.apply(x, weight, bias, eps, residual, noise, p)
    return out


def _total(
    x: torch.Tensor, residual: torch.Tensor | None, noise: torch.Tensor | None, p: float
) -> torch.Tensor:
    """The normed sum, in one pass after the mask."""
    if residual is None:
        return x if noise is None else drop.apply(x, noise, p)
    if noise is None:
        return x + residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    mask = drop.keep(noise, p, dtype)
    return torch.addcmul(residual.to(dtype), x.to(dtype), mask, value=drop.level(p)[1])


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None,
        noise: torch.Tensor | None,
        p: float,
    ) -> torch.Tensor:
        ctx.p, ctx.dtypes = p, (x.dtype, residual.dtype if residual is not None else None)
        ctx.compiled = _loops.refusal(x, weight, bias, residual) is None
        if ctx.compiled:
            out, total, mean, factor = _compiled(x, weight, bias, eps, residual, noise, p)
        else:
            total = _total(x, residual, noise, p)
            out, mean, factor = torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, mean, factor, noise)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        total, weight, bias, mean, factor, noise = ctx.saved_tensors
        asked = ctx.needs_input_grad
        through = asked[0] or asked[4]
        if ctx.compiled:
            found = _compiled_backward(ctx, dy.contiguous())
        else:
            shape, mask = total.shape[-1:], [through, asked[1], asked[2]]
            found = torch.ops.aten.native_layer_norm_backward(
                dy.contiguous(), total, shape, mean, factor, weight, bias, mask
            )
        d_total, d_weight, d_bias = found[:3]
        dx = d_residual = None
        if asked[0]:
            if len(found) == 4:
                dx = found[3]
            else:
                dx = d_total if noise is None else drop.apply(d_total, noise, ctx.p)
            dx = dx.to(ctx.dtypes[0])
        if asked[4]:
            d_residual = d_total.to(ctx.dtypes[1])
        return dx, d_weight, d_bias, None, d_residual, None, None


def _compiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    noise: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, ...]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    d = x.shape[-1]
    t = x.numel() // max(d, 1)
    total = x if residual is None and noise is None else torch.empty_like(x)
    out = torch.empty_like(x)
    mean, factor = torch.empty(t), torch.empty(t)
    least, scale = drop.level(p)
    _FORWARD(
        x.numel(), x, residual, noise, weight, bias, total, out, mean, factor,
        t, d, float(eps), least, scale,
    )  # fmt: skip
    return out, total, mean, factor


def _compiled_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of total, weight, bias and, with dropout, of x."""
    total, weight, _, mean, factor, noise = ctx.saved_tensors
    d = total.shape[-1]
    t = total.numel() // max(d, 1)
    asked = ctx.needs_input_grad
    d_total = d_weight = d_bias = None
    dx: tuple[torch.Tensor, ...] = ()
    if asked[0] or asked[4]:
        d_total = torch.empty_like(total)
        if noise is not None and asked[0]:
            dx = (torch.empty_like(total),)
        least, scale = drop.level(ctx.p)
        _BACKWARD(
            total.numel(), dy, total, weight, mean, factor, noise if dx else None, d_total,
            dx[0] if dx else None, t, d, least, scale,
        )  # fmt: skip
    if asked[1]:
        normed = (total.view(t, d).float() - mean[:, None]).mul_(factor[:, None])
        d_weight = normed.mul_(dy.view(t, d)).sum(0).to(weight.dtype)
    if asked[2]:
        d_bias = dy.view(t, d).sum(0, dtype=torch.float32).to(weight.dtype)
    return (d_total, d_weight, d_bias, *dx)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(15)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for shape, added, p in (
        ((1, 7), False, 0.0),
        ((2, 5, 33), True, 0.0),
        ((3, 129), True, 0.1),
        ((61, 384), True, 0.1),
        ((5, 48), False, 0.5),
    ):
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator).short()
        d = shape[-1]
        inputs = {
            "x": normal(*shape) * 3 + 0.5,
            "weight": torch.rand(d, dtype=torch.float64, generator=generator) + 0.5,
            "bias": normal(d),
            "eps": 1e-12,
            "residual": normal(*shape) if added else None,
            "noise": bits if p else None,
            "p": p,
        }
        grads = ("x", "weight", "bias", *(("residual",) if added else ()))
        yield Case("x".join(map(str, shape)) + f"-added{int(added)}-p{p}", inputs, grads)


OP = Op(
    reference=reference,
    implementations={"saved": layer_norm},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
