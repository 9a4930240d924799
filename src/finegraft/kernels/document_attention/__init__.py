"""Causal attention inside each document of a flat batch; no token sees another document.

What: documents of different lengths lie behind one another, without padding and without a t x t
mask. The plain-torch reference attends document by document.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from finegraft.kernels import rotary
from finegraft.kernels._contract import Case, Op
from finegraft.kernels.document_attention import bucketed
from finegraft.kernels.document_attention.layout import Documents
from finegraft.kernels.document_attention.rectangles import Angles

__all__ = ["OP", "Documents", "document_attention"]

document_attention = bucketed.document_attention


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
    for start, length in documents.spans():
        q = query[start : start + length].transpose(0, 1)  # [h, l, f]
        k = key[start : start + length].transpose(0, 1).repeat_interleave(groups, 0)
        v = value[start : start + length].transpose(0, 1).repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append((torch.softmax(scores, -1) @ v).transpose(0, 1))
    return torch.cat(outs)


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
    for start, length in documents.spans():
        q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in (query, key, value))
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            seen &= torch.ones_like(seen).triu(1 - window)
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(9)
    for lengths, h, k, f, window, softcap, pairs in (
        ((1,), 1, 1, 2, None, None, 0),
        ((5, 1, 7), 4, 2, 8, None, None, 4),
        ((16, 16, 16), 9, 3, 16, None, None, 0),
        ((40, 3, 70, 33, 3), 4, 1, 8, None, None, 3),
        ((300, 20), 4, 2, 8, None, None, 4),
        ((50, 9, 300), 4, 2, 8, 7, None, 0),
        ((21, 9, 1), 4, 2, 8, None, 3.0, 4),
        ((600, 5), 2, 1, 8, 290, 3.0, 0),
    ):
        t = sum(lengths)

        def normal(heads: int, t: int = t, f: int = f) -> torch.Tensor:
            return torch.randn(t, heads, f, dtype=torch.float64, generator=generator)

        turn = torch.rand(t, pairs, dtype=torch.float64, generator=generator) * 6
        inputs = {
            "query": normal(h),
            "key": normal(k),
            "value": normal(k),
            "documents": Documents(lengths),
            "scale": f**-0.5,
            "window": window,
            "softcap": softcap,
            "angles": (turn.cos(), turn.sin()) if pairs else None,
        }
        label = "-".join(map(str, lengths)) + f"-h{h}-k{k}-window{window}-cap{softcap}-r{pairs}"
        yield Case(label, inputs, ("query", "key", "value"))


OP = Op(
    reference=reference,
    implementations={"bucketed": document_attention},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
    stock=stock,
)
