"""Packing as training does it: every token of every row once, and sequences that are full."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tiny import tiny

from finegraft.data.pack import pack
from finegraft.training.dataset import Rendering, columns

ROWS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(lengths=ROWS, capacity=st.integers(60, 200))
def test_every_token_exactly_once(lengths: list[int], capacity: int) -> None:
    check_tokens(lengths, capacity)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(lengths=ROWS, capacity=st.integers(60, 200))
def test_every_token_exactly_once_long(lengths: list[int], capacity: int) -> None:
    check_tokens(lengths, capacity)


def check_tokens(lengths: list[int], capacity: int) -> None:
    """Rows of distinct ids, found again whole and side by side with their labels."""
    ids = [[1000 * row + at for at in range(length)] for row, length in enumerate(lengths)]
    labels = [[-100, *(-token for token in row[1:])] for row in ids]
    packed = columns(ids, labels, Rendering(tiny(), capacity, packing=True))
    found = []
    for tokens, learnt, parts in zip(
        packed["input_ids"], packed["labels"], packed["seq_lengths"], strict=True
    ):
        assert len(tokens) == len(learnt) == sum(parts) <= capacity
        at = 0
        for size in parts:
            found.append((tuple(tokens[at : at + size]), tuple(learnt[at : at + size])))
            at += size
    assert Counter(found) == Counter(
        (tuple(row), tuple(label)) for row, label in zip(ids, labels, strict=True)
    )


def ragged(seed: int, count: int, capacity: int, spread: float) -> list[int]:
    """Lengths as chat rows have them: many short ones, a few up to the capacity."""
    dice = random.Random(seed)
    median = capacity / 10
    return [
        min(capacity, max(4, round(median * dice.lognormvariate(0, spread)))) for _ in range(count)
    ]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    count=st.integers(1000, 3000),
    capacity=st.sampled_from([512, 1024, 2048, 4096]),
    spread=st.floats(0.3, 1.0),
)
def test_ragged_rows_fill_97_percent(seed: int, count: int, capacity: int, spread: float) -> None:
    lengths = ragged(seed, count, capacity, spread)
    bins = pack(lengths, capacity)
    assert sum(lengths) / (capacity * len(bins)) >= 0.97
