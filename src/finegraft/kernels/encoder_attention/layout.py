"""Where the rows of a padded batch lie in a flat one, and how to lift them into rectangles.

What: ``Rows`` drops the pads of a mask and puts results back; rows of similar length form a bucket
that is lifted into [n, l] for one batched product. Constraint: filling tokens of a bucket never
count as keys and their results are never taken back. Trade-off: the flat batch is filled up to a
few sizes (at most 12%, 4% on average), because oneDNN takes 4 ms to prepare a product of a size it
has not seen, eight times what the product itself takes; 50 sizes cost as much as the arithmetic.

Shapes: b rows, w width of the padded batch, t tokens, u tokens with filling, n rows of a bucket,
l length of its longest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finegraft.kernels.document_attention.layout import SHORT, Rectangle

# A bucket's shortest row has at least this share of the longest: half of a square is wasted there.
_SIMILAR = 0.6


@dataclass(frozen=True, eq=False)
class Bucket(Rectangle):
    """Rows of similar length; ``rows`` are the places of their own tokens in the flat batch.

    Attributes:
        members: [n] numbers of the rows, -1 for a spare one.
        sizes: [n] their lengths, l for a spare one.
    """

    members: torch.Tensor
    sizes: torch.Tensor

    @functools.cached_property
    def full(self) -> bool:
        """No filling."""
        return self.rows.numel() == self.slots.numel()

    @functools.cached_property
    def firsts(self) -> Rectangle:
        """One slot a row, for one token of each that lie behind one another."""
        return Rectangle(1, self.count, self.members)


class Rows:
    """Rows behind one another without padding.

    Args:
        lengths: Tokens of each row, at least 1.
        places: [t] where the tokens lie in the padded batch [b * w]; None: they fill it.
        width: w; None: the rows come from no padded batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        places: torch.Tensor | None = None,
        width: int | None = None,
    ):
        self.lengths = tuple(int(n) for n in lengths)
        self.tokens = sum(self.lengths)
        self.filled = _size(self.tokens)
        self.width = width
        self.places = places

    @classmethod
    def of_mask(cls, mask: torch.Tensor) -> Rows:
        """Rows of an attention mask [b, w], 0 where a token is padding; no row may be empty."""
        real = mask != 0
        places = real.reshape(-1).nonzero().squeeze(-1)
        return cls(real.sum(1).tolist(), places, mask.shape[1])

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """[b] place of each row's first token in the flat batch."""
        return torch.tensor([0, *self.lengths[:-1]]).cumsum(0)

    @functools.cached_property
    def taken(self) -> torch.Tensor:
        """[u] places in the padded batch to take, the filling repeats the first one."""
        own = torch.arange(self.tokens) if self.places is None else self.places
        return torch.cat([own, own[:1].expand(self.filled - self.tokens)])

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """[b, w, ...] to [1, u, ...]."""
        return x.flatten(0, 1).index_select(0, self.taken)[None]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[1, u, ...] to [b, w, ...], zeros where there is padding."""
        own, width = x[0, : self.tokens], self.width or 0
        shape = (len(self.lengths), width, *x.shape[2:])
        if self.tokens == len(self.lengths) * width:
            return own.reshape(shape)
        assert self.places is not None
        full = x.new_zeros(shape[0] * width, *x.shape[2:])
        return full.index_copy(0, self.places, own).view(shape)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """[1, u, ...] to [1, b, ...], the first token of each row."""
        return x.index_select(1, self.starts)

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        """All rows by length; a row above ``SHORT`` is a bucket of its own."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        for i in order:
            longest = self.lengths[groups[-1][0]] if groups else 0
            if SHORT >= longest >= self.lengths[i] >= _SIMILAR * longest - 4:
                groups[-1].append(i)
            else:
                groups.append([i])
        return [self._bucket(group) for group in groups]

    def scores(self, heads: int, first: bool) -> int:
        """How many scores all buckets have together."""
        return sum(b.count * heads * (1 if first else b.length) * b.length for b in self.buckets)

    def _bucket(self, group: list[int]) -> Bucket:
        # A few widths and counts, for the same reason as a few sizes; loops take widths by 8.
        longest = -(-self.lengths[group[0]] // 8) * 8
        spare = -len(group) % 4 if len(group) > 1 else 0
        members = torch.tensor([*group, *[-1] * spare])
        sizes = torch.tensor([*(self.lengths[i] for i in group), *[longest] * spare])
        at = torch.arange(longest)[None]  # [1, l]
        inside = (at < sizes[:, None]) & (members >= 0)[:, None]  # [n, l]
        slots = self.starts[members][:, None] + at
        slots = slots.masked_fill(~inside, -1).reshape(-1)
        return Bucket(longest, members.numel(), slots, members, sizes)


def _size(tokens: int) -> int:
    """Round up to one of 8 sizes per octave, so that few sizes ever occur."""
    step = max(8, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step
