"""The rows of a step, shared out to several processes.

What: the rows that one process would take in a step, each given to one of the processes, so that
all have nearly the same number of tokens. How: the rows of a step are given out longest first, each
to the process with the fewest tokens so far in the epoch. Constraint: the order of the rows is that
of one process with as many rows a step, every process takes equally many micro-batches, and none
gets more rows than its share, so that memory does not depend on luck. Trade-off: at the end of an
epoch a process may get an empty micro-batch, which ``Blanks`` fills with a row without a label.

Shapes: b rows of a micro-batch, m micro-batches of a step, n processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from finegraft.training.collate import IGNORED


class SharedBatches(Sampler[list[int]]):
    """Batch sampler of one process.

    Args:
        sampler: The order of all rows, the same in every process.
        lengths: Tokens of each row.
        rows: b.
        micro_batches: m.
        rank: Of this process.
        processes: n.
    """

    def __init__(
        self,
        sampler: Any,
        lengths: Sequence[int],
        rows: int,
        micro_batches: int,
        rank: int,
        processes: int,
    ):
        self.sampler = sampler
        self.lengths = lengths
        self.rows, self.micro_batches = rows, micro_batches
        self.rank, self.processes = rank, processes
        self.batch_size = rows  # asked for by accelerate
        self.drop_last = False

    def __iter__(self) -> Iterator[list[int]]:
        tokens = [0] * self.processes
        step = self.rows * self.micro_batches * self.processes
        rows = iter(self.sampler)
        while taken := list(itertools.islice(rows, step)):
            shares = share_out(taken, self.lengths, tokens)
            count = -(-len(taken) // (self.rows * self.processes))
            yield from portions(shares[self.rank], count)

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.rows * self.processes))

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def share_out(taken: list[int], lengths: Sequence[int], tokens: list[int]) -> list[list[int]]:
    """Give each row to a process; none gets more than the others, rounded up.

    Args:
        taken: The rows.
        lengths: Tokens by row.
        tokens: What each process had so far; brought up to date.

    Returns:
        For each process its rows, in the order of ``taken``.
    """
    count = len(tokens)
    most = -(-len(taken) // count)
    shares: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(taken)), key=lambda i: (-lengths[taken[i]], i)):
        open_to = [r for r in range(count) if len(shares[r]) < most]
        lightest = min(open_to, key=lambda r: (tokens[r], r))
        shares[lightest].append(place)
        tokens[lightest] += lengths[taken[place]]
    return [[taken[place] for place in sorted(share)] for share in shares]


def portions(rows: list[int], count: int) -> Iterator[list[int]]:
    """``count`` parts of nearly equal length, some of them empty where there are few rows."""
    least, more = divmod(len(rows), count)
    at = 0
    for part in range(count):
        size = least + (part < more)
        yield rows[at : at + size]
        at += size


class Blanks:
    """A collator that also takes no row at all.

    Args:
        collate: The collator of one or more rows.
        row: Any row; it stands for none, with labels that are ignored.
    """

    def __init__(self, collate: Callable[[Any], dict[str, Any]], row: Any):
        self.collate = collate
        self.row = row

    def __call__(self, rows: Any) -> dict[str, Any]:
        if len(rows):
            return self.collate(rows)
        batch = self.collate([self.row])
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


def is_blank(labels: torch.Tensor) -> bool:
    """Whether a batch carries no label."""
    return bool((labels == IGNORED).all())
