"""Causal attention inside each document of a flat batch; no token sees another document.

What: documents of different lengths lie behind one another, without padding and without a t x t
mask. The plain-torch reference attends document by document.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from finegraft.kernels._contract import Case, Op
from finegraft.kernels.document_attention import bucketed
from finegraft.kernels.document_attention.layout import Documents

__all__ = ["OP", "Documents", "document_attention"]

document_attention = bucketed.document_attention


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention, document by document.

    Args:
        query: [t, h, f].
        key: [t, k, f], each key head serving h / k query heads.
        value: [t, k, f].
        documents: Lengths that sum to t.
        scale: Factor on the scores.
        window: A token sees itself and ``window - 1`` tokens before it; None: all before it.

    Returns:
        [t, h, f].
    """
    groups = query.shape[1] // key.shape[1]
    outs = []
    for start, length in documents.spans():
        q = query[start : start + length].transpose(0, 1)  # [h, l, f]
        k = key[start : start + length].transpose(0, 1).repeat_interleave(groups, 0)
        v = value[start : start + length].transpose(0, 1).repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2)) * scale
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
) -> torch.Tensor:
    """What transformers runs: torch's SDPA, here document by document."""
    spans = [slice(start, start + length) for start, length in documents.spans()]
    return torch.cat([bucketed.sdpa(query[s], key[s], value[s], scale, window) for s in spans])


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(9)
    for lengths, h, k, f, window in (
        ((1,), 1, 1, 2, None),
        ((5, 1, 7), 4, 2, 8, None),
        ((16, 16, 16), 9, 3, 16, None),
        ((40, 3, 70, 33, 3), 4, 1, 8, None),
        ((300, 20), 4, 2, 8, None),
        ((50, 9, 300), 4, 2, 8, 7),
    ):
        t = sum(lengths)

        def normal(heads: int, t: int = t, f: int = f) -> torch.Tensor:
            return torch.randn(t, heads, f, dtype=torch.float64, generator=generator)

        inputs = {
            "query": normal(h),
            "key": normal(k),
            "value": normal(k),
            "documents": Documents(lengths),
            "scale": f**-0.5,
            "window": window,
        }
        label = "-".join(map(str, lengths)) + f"-h{h}-k{k}-window{window}"
        yield Case(label, inputs, ("query", "key", "value"))


OP = Op(
    reference=reference,
    implementations={"bucketed": document_attention},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
    stock=stock,
)
