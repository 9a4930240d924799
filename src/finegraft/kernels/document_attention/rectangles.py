"""A flat batch to rectangles of documents and back, with the rotation of q and k on the way.

What: two functions with gradients, ``lift`` and ``lower``; between them every rectangle attends by
itself. How: compiled loops on bfloat16, indexing elsewhere. Constraint: slots without a token hold
zeros, and no gradient comes back from them. The gradients of q, k and v are columns of one tensor,
so that a product over all three needs no copy.

Shapes: t tokens, n documents of l tokens, h heads, k key heads, g = h / k, f features, r rotated
pairs of features.
"""

from __future__ import annotations

from typing import Any

import torch

from finegraft.kernels import _loops
from finegraft.kernels.document_attention.layout import Documents, Rectangle
from finegraft.kernels.rotary import rotate

_LIFT = _loops.Kernel("document_attention", "lift")
_LOWER = _loops.Kernel("document_attention", "lower")

Angles = tuple[torch.Tensor, torch.Tensor]


def lift(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    angles: Angles | None,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return q [k * n, g * l, f], k and v [k * n, l, f] of each rectangle.

    Args:
        query: [t, h, f], key and value [t, k, f].
        angles: cos and sin [t, r] by which query and key are rotated, or None.
    """
    cos, sin = angles or (None, None)
    flat = _Lift.apply(query, key, value, cos, sin, documents)
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def lower(outs: list[torch.Tensor], heads: int, documents: Documents) -> torch.Tensor:
    """Return [t, h, f] from the rectangles' [k * n, g * l, f]."""
    flat: torch.Tensor = _Lower.apply(heads, documents, *outs)
    return flat


class _Lift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        documents: Documents,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.documents, ctx.heads = documents, query.shape[1]
        keys = key.shape[1]
        lifted = []
        for rectangle in documents.rectangles:
            lifted.append(lift_one(query, rectangle, keys, cos, sin))
            lifted.append(lift_one(key, rectangle, keys, cos, sin))
            lifted.append(lift_one(value, rectangle, keys))
        return tuple(lifted)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        t, f, h = ctx.documents.tokens, grads[0].shape[-1], ctx.heads
        rectangles = ctx.documents.rectangles
        keys = grads[1].shape[0] // rectangles[0].count
        both = grads[0].new_empty(t, h + 2 * keys, f)
        parts = both.split([h, keys, keys], 1)
        for i, rectangle in enumerate(rectangles):
            for j, part in enumerate(parts):
                angles = (cos, sin) if j < 2 else (None, None)
                lower_one(grads[3 * i + j], rectangle, keys, part, *angles)
        return (*parts, None, None, None)


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: int, documents: Documents, *outs: torch.Tensor) -> torch.Tensor:
        ctx.documents = documents
        ctx.keys = outs[0].shape[0] // documents.rectangles[0].count
        flat = outs[0].new_empty(documents.tokens, heads, outs[0].shape[-1])
        for out, rectangle in zip(outs, documents.rectangles, strict=True):
            lower_one(out, rectangle, ctx.keys, flat)
        return flat

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rectangles = ctx.documents.rectangles
        return (None, None, *(lift_one(grads[0], r, ctx.keys) for r in rectangles))


def _compiled(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> bool:
    return x.stride(1) == x.shape[2] and _loops.refusal(x, cos, sin) is None


def lift_one(
    x: torch.Tensor,
    rectangle: Rectangle,
    keys: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """[t, k * g, f] to [k * n, g * l, f], rotated where angles are given."""
    n, length = rectangle.count, rectangle.length
    groups, f = x.shape[1] // keys, x.shape[2]
    if _compiled(x, cos, sin):
        out = x.new_empty(keys * n, groups * length, f)
        pairs = 0 if cos is None else cos.shape[1]
        sizes = (n, length, keys, groups, f)
        _LIFT(out.numel(), x, x.stride(0), rectangle.slots, out, *sizes, cos, sin, pairs)
        return out
    if cos is not None and sin is not None:
        x = rotate(x, cos, sin, 1)
    filled = x.new_zeros(n * length, *x.shape[1:])
    filled[rectangle.places.to(x.device)] = x[rectangle.rows.to(x.device)]
    filled = filled.view(n, length, keys, groups, f).permute(2, 0, 3, 1, 4)
    return filled.reshape(keys * n, groups * length, f)


def lower_one(
    lifted: torch.Tensor,
    rectangle: Rectangle,
    keys: int,
    out: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """The rows of ``out`` [t, k * g, f] that the rectangle holds, rotated back."""
    n, length = rectangle.count, rectangle.length
    groups, f = out.shape[1] // keys, out.shape[2]
    lifted = lifted.contiguous()
    if _compiled(out, cos, sin):
        pairs = 0 if cos is None else cos.shape[1]
        sizes = (n, length, keys, groups, f)
        _LOWER(lifted.numel(), lifted, rectangle.slots, out, out.stride(0), *sizes, cos, sin, pairs)
        return
    flat = lifted.view(keys, n, groups, length, f).permute(1, 3, 0, 2, 4)
    flat = flat.reshape(n * length, keys * groups, f)[rectangle.places.to(out.device)]
    rows = rectangle.rows.to(out.device)
    if cos is not None and sin is not None:
        flat = rotate(flat, cos[rows], sin[rows], -1)
    out[rows] = flat
