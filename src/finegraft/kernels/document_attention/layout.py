"""Where documents lie in a flat batch, and the rectangles in which they attend.

What: documents of similar length share a rectangle [n, l]; each of its slots names a row of the
flat batch, or none where a short document is filled up. A long document is a rectangle of its own.
Constraint: filling comes after a document's own tokens, so the causal mask hides it, and what is
computed there is never taken back.

Shapes: t tokens, n documents of a rectangle, l length of its longest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Documents longer than this attend one by one: their scores would no longer fit the cache.
SHORT = 256
# Borders in tokens: a document is filled up to at most the longest of its rectangle.
_BORDERS = (16, 32, 48, 64, 96, 128, 192, SHORT)


@dataclass(frozen=True)
class Rectangle:
    """Documents that attend together.

    Attributes:
        length: l, in tokens.
        count: n.
        slots: [n * l] rows of the flat batch, -1 for filling.
    """

    length: int
    count: int
    slots: torch.Tensor

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """Slots that hold a token."""
        return (self.slots >= 0).nonzero().squeeze(-1)

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """Rows of the flat batch in the order of ``places``."""
        return self.slots[self.places]


class Documents:
    """Lengths of the documents of a flat batch, in tokens.

    Args:
        lengths: Of each document; empty ones are left out.
        shared: The first document is the beginning of all the others: each of their tokens sees
            all of it, as if it stood before them. No document may be long then.
    """

    def __init__(self, lengths: Sequence[int], shared: bool = False):
        self.lengths = tuple(int(n) for n in lengths if int(n) > 0)
        self.shared = shared and len(self.lengths) > 1
        if self.shared and max(self.lengths) > SHORT:
            raise ValueError(f"a shared beginning, and a document of {max(self.lengths)} tokens")

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
    def rectangles(self) -> list[Rectangle]:
        """The short documents by length, then the long ones; together they hold every row once.

        A shared beginning is the first rectangle, and alone in it.
        """
        short: dict[int, list[tuple[int, int]]] = {}
        long: list[Rectangle] = []
        spans = list(self.spans())
        first = [self._rectangle(spans[0][1], spans[:1])] if self.shared else []
        for start, length in spans[len(first) :]:
            if length <= SHORT:
                border = next(b for b in _BORDERS if length <= b)
                short.setdefault(border, []).append((start, length))
            else:
                long.append(Rectangle(length, 1, torch.arange(start, start + length)))
        by_length = [self._rectangle(border, found) for border, found in sorted(short.items())]
        return first + by_length + long

    def _rectangle(self, border: int, spans: list[tuple[int, int]]) -> Rectangle:
        starts = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([length for _, length in spans])[:, None]
        # One width per border keeps the shapes few, for each of which oneDNN compiles kernels.
        alike = len(spans) == len(self.lengths) - self.shared and bool(
            (lengths == lengths[0]).all()
        )
        longest = int(lengths[0]) if alike else border
        at = torch.arange(longest)[None]  # [1, l]
        slots = torch.where(at < lengths, starts + at, -1)  # [n, l]
        return Rectangle(longest, len(spans), slots.reshape(-1))
