"""Document attention as batched products for short documents, one call each for long ones.

What: a rectangle of short documents is one ``baddbmm``, one softmax and one ``bmm``, with the
backward by hand; a long document is torch's flash attention, or blocks of queries where that would
need a dense mask (a sliding window, capped scores). Constraint: scores are kept for backward only
for short documents, n * h * l * l of them. Trade-off: lifting into rectangles copies q, k and v
once; bf16 products of 72 x 64 x 64 take 0.09 ms where flash attention takes 8 ms.

Shapes: t tokens, h heads, k key heads, g = h / k, f features, n documents of l tokens, c queries of
a block, s keys that a block sees.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from finegraft.kernels import _loops
from finegraft.kernels.document_attention.layout import SHORT, Documents
from finegraft.kernels.document_attention.rectangles import Angles, lift, lower

_SCORES = _loops.Kernel("document_attention", "score_gradient")

# Queries of a block of a long document: the scores of one block and all its keys are in memory.
_BLOCK = 256
# The same where nothing is kept of a block: smaller ones compute less that the mask hides
# (1,024 tokens, 9 heads: 11.0 ms at 128, 13.6 at 256, 16.0 at 512).
_FLASH_BLOCK = 128


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    angles: Angles | None = None,
) -> torch.Tensor:
    """Same contract as the reference; differentiable in ``query``, ``key`` and ``value``."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # in one dtype, as autocast does around torch's attention
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        with torch.autocast(kind, enabled=False):
            return document_attention(q, k, v, documents, scale, window, softcap, angles)
    if documents.shared and window is not None and window < sum(sorted(documents.lengths)[-2:]):
        raise ValueError("a shared beginning, and a window that may not reach it")
    outs: list[torch.Tensor] = []
    lifted = lift(query, key, value, documents, angles)
    for rectangle, (q, k, v) in zip(documents.rectangles, lifted, strict=True):
        if documents.shared and outs:
            part = _Shared.apply(q, k, v, *lifted[0][1:], rectangle.length, scale, softcap)
        elif rectangle.length <= SHORT:
            part: torch.Tensor = _Short.apply(q, k, v, rectangle.length, scale, window, softcap)
        elif softcap is None and (window is None or rectangle.length <= window):
            part = _long(q, k, v, scale)
        else:
            part = _Blocks.apply(q, k, v, scale, window, softcap)
        outs.append(part)
    return lower(outs, query.shape[1], documents)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[k, g * l, f] and [k, l, f], one document, through torch's own kernel."""
    keys, length, f = k.shape
    out = F.scaled_dot_product_attention(
        q.view(1, -1, length, f), k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
    )
    return out.reshape(keys, -1, f)


def _long(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One long document; torch's own backward where the compiled loop cannot run."""
    if _loops.refusal(q, k, v) is not None:
        return _flash(q, k, v, scale)
    out: torch.Tensor = _Flash.apply(q, k, v, scale)
    return out


class _Flash(torch.autograd.Function):
    """torch's flash attention forward, with a backward in blocks of queries.

    torch's backward takes 6 times its forward on a CPU (15 ms against 2.5 for 1,024 tokens, 9
    heads); large products with one pass over scores and gradients between them take half of that.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, length, f = k.shape
        wide_k, wide_v = (x.repeat_interleave(q.shape[1] // length, 0)[None] for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.view(1, -1, length, f), wide_k, wide_v, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out.reshape(keys, -1, f)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        keys, length, f = k.shape
        do = grads[0].reshape(keys, -1, length, f)
        q = q.view(keys, -1, length, f)
        delta = (do.float() * out.view_as(do)).sum(-1)  # [k, g, l]
        lse = lse.contiguous()
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for block in _blocks(length, None, _FLASH_BLOCK):
            own_q, own_do = (x[:, :, block.own].reshape(keys, -1, f) for x in (q, do))
            p = torch.bmm(own_q, k[:, block.seen].transpose(1, 2))  # [k, g * c, s]
            ds = torch.bmm(own_do, v[:, block.seen].transpose(1, 2))
            start, end = block.own.start, block.own.stop
            sizes = (keys, q.shape[1], end - start, end, length, start)
            _SCORES(p.numel(), p, ds, lse, delta, *sizes, float(ctx.scale))
            dv[:, block.seen] += torch.bmm(p.transpose(1, 2), own_do)
            dk[:, block.seen] += torch.bmm(ds.transpose(1, 2), own_q)
            dq[:, :, block.own] = torch.bmm(ds, k[:, block.seen]).view(keys, -1, end - start, f)
        return dq.view(keys, -1, f), dk.to(k.dtype), dv.to(v.dtype), None


@functools.lru_cache(maxsize=16)  # every layer of a batch asks for the same few
def _mask(
    queries: int,
    keys: int,
    groups: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Additive mask [1, g * c, s] of the last ``queries`` of ``keys`` places.

    Large and negative, because infinity makes nan of bf16.
    """
    at = torch.arange(keys, device=device)
    ahead = at[None] - at[keys - queries :, None]  # [c, s]
    hidden = ahead > 0
    if window is not None:
        hidden |= ahead <= -window
    mask = torch.zeros(queries, keys, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, -1e30).repeat(groups, 1)[None]


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked scores [b, g * c, s], and tanh of the capped ones where there is a cap."""
    if softcap is not None:
        bent = torch.bmm(q, k.transpose(1, 2)).mul_(scale / softcap).tanh_()
        return bent * softcap if mask is None else torch.add(mask, bent, alpha=softcap), bent
    if mask is None:
        return torch.bmm(q, k.transpose(1, 2)).mul_(scale), None
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale), None


def _score_gradient(
    dp: torch.Tensor, p: torch.Tensor, bent: torch.Tensor | None, scale: float
) -> torch.Tensor:
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
    return ds if bent is None else ds.addcmul_(ds * bent, bent, value=-1)


class _Short(torch.autograd.Function):
    """All documents of a rectangle at once; the probabilities are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        length: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        groups = q.shape[1] // length
        window = None if window is None or window >= length else window
        mask = _mask(length, length, groups, window, q.dtype, q.device)
        scores, bent = _scores(q, k, mask, scale, softcap)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p, bent)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p, bent = ctx.saved_tensors
        (do,) = grads
        dv = torch.bmm(p.transpose(1, 2), do)
        ds = _score_gradient(torch.bmm(do, v.transpose(1, 2)), p, bent, ctx.scale)
        return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv, None, None, None, None


class _Shared(torch.autograd.Function):
    """All documents of a rectangle behind one beginning, whose keys and values are not repeated.

    Shapes: p tokens of the beginning.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first_k: torch.Tensor,
        first_v: torch.Tensor,
        length: int,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        mask = _mask(length, length, q.shape[1] // length, None, q.dtype, q.device)
        own, own_bent = _scores(q, k, mask, scale, softcap)  # [k * n, g * l, l]
        # A key head's documents lie behind one another: one product with the beginning for all.
        before, bent = _scores(_by_key(q, first_k), first_k, None, scale, softcap)
        p = torch.softmax(torch.cat([before.view(*own.shape[:2], -1), own], -1), -1)
        if bent is not None and own_bent is not None:
            bent = torch.cat([bent.view(*own.shape[:2], -1), own_bent], -1)
        first, rest = p.split([first_k.shape[1], length], -1)
        out = torch.bmm(_by_key(first, first_k), first_v).view_as(q)
        out.baddbmm_(rest, v)
        ctx.save_for_backward(q, k, v, first_k, first_v, p, bent)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, first_k, first_v, p, bent = ctx.saved_tensors
        do, lengths = grads[0].contiguous(), [first_k.shape[1], k.shape[1]]
        first, rest = p.split(lengths, -1)
        d_first_v = torch.bmm(_by_key(first, first_k).transpose(1, 2), _by_key(do, first_k))
        dv = torch.bmm(rest.transpose(1, 2), do)
        dp = torch.bmm(_by_key(do, first_k), first_v.transpose(1, 2)).view(*p.shape[:2], -1)
        dp = torch.cat([dp, torch.bmm(do, v.transpose(1, 2))], -1)
        ds_first, ds = _score_gradient(dp, p, bent, ctx.scale).split(lengths, -1)
        dq = torch.bmm(_by_key(ds_first, first_k), first_k).view_as(q)
        dq.baddbmm_(ds, k)
        d_first_k = torch.bmm(_by_key(ds_first, first_k).transpose(1, 2), _by_key(q, first_k))
        dk = torch.bmm(ds.transpose(1, 2), q)
        return dq, dk, dv, d_first_k, d_first_v, None, None, None


def _by_key(x: torch.Tensor, first_k: torch.Tensor) -> torch.Tensor:
    """[k * n, g * l, ...] to [k, n * g * l, ...], without a copy."""
    return x.view(first_k.shape[0], -1, x.shape[-1])


class _Blocks(torch.autograd.Function):
    """One long document, a block of queries at a time; probabilities are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = scale, window, softcap
        keys, length, f = k.shape
        out = torch.empty_like(q).view(keys, -1, length, f)
        for block in _blocks(length, window):
            p, _ = _block_probabilities(q, k, block, *ctx.settings)
            part = torch.bmm(p, v[:, block.seen])
            out[:, :, block.own] = part.view(keys, -1, block.own.stop - block.own.start, f)
        return out.view_as(q)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        keys, length, f = k.shape
        do = grads[0].view(keys, -1, length, f)
        dq, dk, dv = torch.empty_like(do), torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(length, ctx.settings[1]):
            p, bent = _block_probabilities(q, k, block, *ctx.settings)
            d = do[:, :, block.own].reshape(keys, -1, f)
            dv[:, block.seen] += torch.bmm(p.transpose(1, 2), d)
            dp = torch.bmm(d, v[:, block.seen].transpose(1, 2))
            ds = _score_gradient(dp, p, bent, ctx.settings[0])
            own = q.view(keys, -1, length, f)[:, :, block.own].reshape(keys, -1, f)
            part = torch.bmm(ds, k[:, block.seen])
            dq[:, :, block.own] = part.view(keys, -1, block.own.stop - block.own.start, f)
            dk[:, block.seen] += torch.bmm(ds.transpose(1, 2), own)
        return dq.view_as(q), dk, dv, None, None, None


@functools.lru_cache(maxsize=8)
def _blocks(length: int, window: int | None, size: int = _BLOCK) -> list[_Block]:
    return [_Block(start, min(start + size, length), window) for start in range(0, length, size)]


class _Block:
    """Queries ``own`` and the keys ``seen`` by any of them, as slices of a document."""

    def __init__(self, start: int, end: int, window: int | None):
        self.own = slice(start, end)
        self.seen = slice(0 if window is None else max(0, start - window + 1), end)


def _block_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    block: _Block,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    keys, length, f = k.shape
    own = q.view(keys, -1, length, f)[:, :, block.own]  # [k, g, c, f]
    queries, seen = own.shape[2], block.seen.stop - block.seen.start
    mask = _mask(queries, seen, own.shape[1], window, q.dtype, q.device)
    scores, bent = _scores(own.reshape(keys, -1, f), k[:, block.seen], mask, scale, softcap)
    return torch.softmax(scores, -1), bent
