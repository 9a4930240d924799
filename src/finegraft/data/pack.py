"""Put rows of different lengths into sequences of one capacity, none split.

How: best-fit decreasing. Rows go in from long to short, each into the fullest sequence that still
takes it; free spaces are kept sorted, so a look-up is a bisection and the whole is n log n for a
fixed capacity. Constraint: the result depends on nothing but the lengths. Trade-off: ragged rows
fill 97 to 100% instead of all of it, and no row attends to, or is cut by, another.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

from finegraft.core.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of row indices.

    Args:
        lengths: Tokens in each row.
        capacity: Tokens that a bin holds.

    Returns:
        Bins in order of their first row; inside a bin, indices ascend. Every row is in exactly one.

    Raises:
        DataError: FG-DATA-014, a row longer than ``capacity``.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise DataError(
            "FG-DATA-014",
            f"row {list(lengths).index(longest) + 1} has {longest} tokens, a sequence {capacity}",
            allowed="rows that fit into one sequence",
            fix=f"max_length={capacity} when preparing the rows, or a capacity of {longest}",
        )
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces, ascending
    by_space: dict[int, list[int]] = {}  # free space to a heap of bins that have it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(spaces, lengths[index])
        if at == len(spaces):
            space, chosen = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[at]
            chosen = heapq.heappop(by_space[space])
            if not by_space[space]:
                del by_space[space], spaces[at]
        bins[chosen].append(index)
        space -= lengths[index]
        if space not in by_space:
            by_space[space] = []
            bisect.insort(spaces, space)
        heapq.heappush(by_space[space], chosen)
    return sorted(sorted(rows) for rows in bins)
