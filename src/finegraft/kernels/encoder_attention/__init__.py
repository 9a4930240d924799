"""Attention of every token to all tokens of its own row, in a flat batch without padding.

What: rows of different lengths lie behind one another; no token sees another row. With ``first``
only each row's first token asks, which is all that a classification head reads of the last layer.
The plain-torch reference attends row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from finegraft.kernels import dropout as drop
from finegraft.kernels._contract import Case, Op
from finegraft.kernels.encoder_attention import bucketed
from finegraft.kernels.encoder_attention.layout import Rows

__all__ = ["OP", "Rows", "encoder_attention"]

encoder_attention = bucketed.encoder_attention


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scale: float,
    first: bool = False,
    noise: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """Softmax attention, row by row, with dropout on the probabilities.

    Args:
        query: [u, h, f]; with ``first`` [b, h, f], one token a row.
        key: [u, h, f].
        value: [u, h, f].
        rows: Lengths and layout of the flat batch.
        scale: Factor on the scores.
        first: Only the first token of each row asks.
        noise: int16 [rows.scores(h, first)] bucket by bucket, as ``dropout.draw`` gives, or None.
        p: Probability of dropping a weight.

    Returns:
        [u, h, f], zeros for filling tokens; with ``first`` [b, h, f].

    Source: Attention Is All You Need, arXiv:1706.03762, equation 1.
    """
    out = torch.zeros_like(query)
    heads, at = query.shape[1], 0
    for bucket in rows.buckets:
        asking, length = 1 if first else bucket.length, bucket.length
        here = bucket.count * heads * asking * length
        bits = None
        if noise is not None:
            bits = noise[at : at + here].view(bucket.count, heads, asking, length)
        at += here
        for i, row in enumerate(bucket.members.tolist()):
            if row < 0:
                continue
            start, size = int(rows.starts[row]), rows.lengths[row]
            asks = slice(row, row + 1) if first else slice(start, start + size)
            q = query[asks].transpose(0, 1)  # [h, asking, f]
            k, v = (x[start : start + size].transpose(0, 1) for x in (key, value))
            weights = torch.softmax(q @ k.transpose(1, 2) * scale, -1)
            if bits is not None:
                weights = drop.reference(weights, bits[i, :, : q.shape[1], :size], p)
            out[asks] = (weights @ v).transpose(0, 1)
    return out


def stock(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scale: float,
    first: bool = False,
    noise: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """What transformers runs: torch's SDPA, here row by row; its dropout takes no bits."""
    if noise is not None:
        return reference(query, key, value, rows, scale, first, noise, p)
    out = torch.zeros_like(query)
    for row, size in enumerate(rows.lengths):
        start = int(rows.starts[row])
        asks = slice(row, row + 1) if first else slice(start, start + size)
        q = query[asks].transpose(0, 1)[None]
        k, v = (x[start : start + size].transpose(0, 1)[None] for x in (key, value))
        out[asks] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(17)
    for lengths, h, f, first, p in (
        ((1,), 1, 2, False, 0.0),
        ((5, 1, 7), 3, 8, False, 0.0),
        ((16, 16, 16), 4, 16, False, 0.1),
        ((40, 3, 70, 33, 3), 4, 8, False, 0.1),
        ((40, 3, 70, 33, 3), 4, 8, True, 0.1),
        ((300, 20), 2, 8, False, 0.0),
        ((300, 20), 2, 8, True, 0.0),
        ((300, 20), 2, 8, False, 0.5),
        ((31, 5, 1, 48, 17), 3, 32, False, 0.1),
        ((31, 5, 1, 48, 17), 3, 32, True, 0.1),
        ((9, 20), 2, 64, False, 0.0),
    ):
        rows = Rows(lengths)
        shape = (rows.filled, h, f)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        bits = torch.randint(-(2**15), 2**15, (rows.scores(h, first),), generator=generator)
        inputs = {
            "query": normal(len(lengths), h, f) if first else normal(*shape),
            "key": normal(*shape),
            "value": normal(*shape),
            "rows": rows,
            "scale": f**-0.5,
            "first": first,
            "noise": bits.short() if p else None,
            "p": p,
        }
        label = "-".join(map(str, lengths)) + f"-h{h}-f{f}-first{int(first)}-p{p}"
        yield Case(label, inputs, ("query", "key", "value"))


OP = Op(
    reference=reference,
    implementations={"bucketed": encoder_attention},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
    stock=stock,
)
