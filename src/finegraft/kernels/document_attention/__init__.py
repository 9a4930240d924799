"""Causal attention inside each document of a flat batch; no token sees another document.

What: documents of different lengths lie behind one another, without padding and without a t x t
mask. The plain-torch reference attends document by document.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from finegraft.kernels import _gpu, rotary
from finegraft.kernels._contract import Case, Op
from finegraft.kernels.document_attention import bucketed
from finegraft.kernels.document_attention.layout import Documents
from finegraft.kernels.document_attention.rectangles import Angles

__all__ = ["OP", "Documents", "document_attention"]


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
    """Same contract as ``reference``; differentiable in ``query``, ``key`` and ``value``."""
    on_gpu = _gpu.kernel("document_attention", query, key, value)
    chosen = on_gpu or bucketed.document_attention
    return chosen(query, key, value, documents, scale, window, softcap, angles)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    angles: Angles | None = None,
) -> torch.Tensor:
    """Softmax attention, document by document.

    Args:
        query: [t, h, f].
        key: [t, k, f], each key head serving h / k query heads.
        value: [t, k, f].
        documents: Lengths that sum to t.
        scale: Factor on the scores.
        window: A token sees itself and ``window - 1`` tokens before it; None: all before it.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        angles: cos and sin [t, r] by which query and key are rotated first; None: they are already.

    Returns:
        [t, h, f].
    """
    if angles is not None:
        query, key = (rotary.reference(x, *angles) for x in (query, key))
    groups = query.shape[1] // key.shape[1]
    outs = []
    for seen, length in _seen(documents):
        q = query[seen[-length:]].transpose(0, 1)  # [h, l, f]
        k = key[seen].transpose(0, 1).repeat_interleave(groups, 0)
        v = value[seen].transpose(0, 1).repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(
            _hidden(len(seen), window, query.device)[-length:], float("-inf")
        )
        outs.append((torch.softmax(scores, -1) @ v).transpose(0, 1))
    return torch.cat(outs)


def _seen(documents: Documents) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows that a document's tokens may see, its own last, and how many are its own."""
    for i, (start, length) in enumerate(documents.spans()):
        own = torch.arange(start, start + length)
        before = documents.lengths[0] if documents.shared and i else 0
        yield torch.cat([torch.arange(before), own]), length


def _hidden(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return hidden if window is None else hidden | torch.ones_like(hidden).tril(-window)


def stock(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    angles: Angles | None = None,
) -> torch.Tensor:
    """What transformers runs: torch's SDPA, or its eager attention where scores are capped."""
    if softcap is not None:
        return reference(query, key, value, documents, scale, window, softcap, angles)
    if angles is not None:
        query, key = (rotary.reference(x, *angles) for x in (query, key))
    outs = []
    for seen, length in _seen(documents):
        q, k, v = (x[seen].transpose(0, 1)[None] for x in (query, key, value))
        mask = ~_hidden(len(seen), window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1)[-length:])
    return torch.cat(outs)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(9)
    for lengths, h, k, f, window, softcap, pairs, *shared in (
        ((1,), 1, 1, 2, None, None, 0),
        ((5, 1, 7), 4, 2, 8, None, None, 4),
        ((16, 16, 16), 9, 3, 16, None, None, 0),
        ((40, 3, 70, 33, 3), 4, 1, 8, None, None, 3),
        ((300, 20), 4, 2, 8, None, None, 4),
        ((50, 9, 300), 4, 2, 8, 7, None, 0),
        ((21, 9, 1), 4, 2, 8, None, 3.0, 4),
        ((600, 5), 2, 1, 8, 290, 3.0, 0),
        ((9, 5, 17, 40, 1, 5), 4, 2, 8, None, None, 4, True),
        ((33, 20, 20, 20), 9, 3, 16, None, None, 0, True),
        ((7, 5, 33), 4, 2, 8, None, 3.0, 4, True),
    ):
        t = sum(lengths)

        def normal(heads: int, t: int = t, f: int = f) -> torch.Tensor:
            return torch.randn(t, heads, f, dtype=torch.float64, generator=generator)

        turn = torch.rand(t, pairs, dtype=torch.float64, generator=generator) * 6
        inputs = {
            "query": normal(h),
            "key": normal(k),
            "value": normal(k),
            "documents": Documents(lengths, bool(shared)),
            "scale": f**-0.5,
            "window": window,
            "softcap": softcap,
            "angles": (turn.cos(), turn.sin()) if pairs else None,
        }
        label = "-".join(map(str, lengths)) + f"-h{h}-k{k}-window{window}-cap{softcap}-r{pairs}"
        label += "-shared" * bool(shared)
        yield Case(label, inputs, ("query", "key", "value"))


OP = Op(
    reference=reference,
    implementations={"bucketed": document_attention},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
    stock=stock,
)
