"""Packing: properties, and how full it gets."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finegraft.core.errors import DataError
from finegraft.data.pack import pack


@given(st.lists(st.integers(0, 100), max_size=200), st.integers(100, 300))
def test_every_row_once_and_no_bin_over(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(i for rows in bins for i in rows) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in rows) <= capacity for rows in bins)
    assert all(rows == sorted(rows) and rows for rows in bins)
    assert bins == sorted(bins) == pack(lengths, capacity)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=100))
def test_no_two_bins_fit_into_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[i] for i in rows) for rows in pack(lengths, 100))
    assert len(loads) == 1 or loads[0] + loads[1] > 100


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ragged_lengths_fill_97_percent(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [min(1024, max(4, round(rng.lognormvariate(4.5, 0.8)))) for _ in range(2000)]
    bins = pack(lengths, 1024)
    assert sum(lengths) / (1024 * len(bins)) >= 0.97
    assert len(bins) <= math.ceil(sum(lengths) / 1024) + 1


def test_best_fit_takes_the_fullest_bin() -> None:
    assert pack([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]
    assert pack([9, 7, 8, 6, 2, 3], 10) == [[0], [1, 5], [2, 4], [3]], "2 goes to 8, not to 6 or 7"
    assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack([], 10) == []


def test_a_row_too_long() -> None:
    with pytest.raises(DataError, match=r"FG-DATA-014.*row 2 has 11 tokens, a sequence 10"):
        pack([3, 11], 10)


def test_many_rows_quickly() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(8, 2048) for _ in range(100_000)]
    start = time.perf_counter()
    pack(lengths, 4096)
    assert time.perf_counter() - start < 5.0  # 0.3 s measured
