"""Where documents lie in a flat batch, and how to lift buckets of them into rectangles.

What: documents of similar length form a bucket; a bucket's rows are gathered into [n, l] with the
short ones filled up, and taken back. Constraint: filling tokens come after a document's own, so
the causal mask hides them, and what they compute is never taken back.

Shapes: t tokens, n documents of a bucket, l length of its longest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Documents longer than this attend one by one: their scores would no longer fit the cache.
SHORT = 256
# Bucket borders in tokens: a document is filled up to at most the longest of its bucket.
_BORDERS = (16, 32, 48, 64, 96, 128, 192, SHORT)


@dataclass(frozen=True)
class Bucket:
    """Short documents of similar length.

    Attributes:
        length: l.
        count: n.
        lift: [n * l] rows of the flat batch, filling tokens repeat a document's last.
        back: [tokens] places in [n * l] of the bucket's own tokens.
        rows: [tokens] where these tokens lie in the flat batch.
        whole: The bucket is the whole batch in order, no gathering needed.
    """

    length: int
    count: int
    lift: torch.Tensor
    back: torch.Tensor
    rows: torch.Tensor
    whole: bool


class Documents:
    """Lengths of the documents of a flat batch, in tokens."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(int(n) for n in lengths if int(n) > 0)

    @property
    def tokens(self) -> int:
        """t, the tokens of all documents."""
        return sum(self.lengths)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and length of each document."""
        start = 0
        for length in self.lengths:
            yield start, length
            start += length

    @functools.cached_property
    def long(self) -> list[tuple[int, int]]:
        """Spans of the documents that attend one by one."""
        return [span for span in self.spans() if span[1] > SHORT]

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        """The short documents by length."""
        found: dict[int, list[tuple[int, int]]] = {}
        for start, length in self.spans():
            if length <= SHORT:
                border = next(b for b in _BORDERS if length <= b)
                found.setdefault(border, []).append((start, length))
        return [self._bucket(spans) for _, spans in sorted(found.items())]

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """[t] where each token of the flat batch lies behind all buckets, then all long ones."""
        rows = [bucket.rows for bucket in self.buckets]
        rows += [torch.arange(start, start + length) for start, length in self.long]
        behind = torch.cat(rows)
        order = torch.empty_like(behind)
        order[behind] = torch.arange(behind.numel())
        return order

    def _bucket(self, spans: list[tuple[int, int]]) -> Bucket:
        starts = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([length for _, length in spans])[:, None]
        # One width per bucket keeps the shapes few, for each of which oneDNN compiles kernels.
        longest = int(lengths.max())
        if bool((lengths < longest).any()) or len(spans) < len(self.lengths):
            longest = next(b for b in _BORDERS if longest <= b)
        at = torch.arange(longest)[None]  # [1, l]
        inside = at < lengths  # [n, l]
        lift = starts + at.minimum(lengths - 1)
        rows = (starts + at)[inside]
        whole = bool(inside.all()) and rows.numel() == self.tokens
        back = inside.reshape(-1).nonzero().squeeze(-1)
        return Bucket(longest, len(spans), lift.reshape(-1), back, rows, whole)
