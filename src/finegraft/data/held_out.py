"""Labelled texts on two sides, to train on and to evaluate with, and weights of their classes.

What: ``split`` holds out a share of every class, ``unseen`` takes out of the training rows what a
given held-out file has. Constraint: a text that stands there twice, in whatever case or spacing, is
never on both sides, because a model that has seen it has not been tested by it. Trade-off: a class
of one text is trained and cannot be evaluated, which the caller tells.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from finegraft.data.labels import Examples

_BINS = 10  # of the values of a regression


@dataclass(frozen=True)
class Split:
    """Places of the rows on each side.

    Attributes:
        repeated: Texts that stand there more than once.
        contradictory: Those of them that have different labels.
        only_trained: Strata with a single text, which is trained.
    """

    train: list[int]
    held: list[int]
    repeated: int
    contradictory: int
    only_trained: list[Hashable]


def split(examples: Examples, encoded: Sequence[Any], fraction: float, seed: int) -> Split:
    """Hold out ``fraction`` of the texts of every class; see the module for repeated ones.

    Args:
        encoded: As ``Labels.encode`` gave them.
        fraction: Above 0 and below 1; at least one text of every class that has two.
        seed: Of the choice.
    """
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(examples.keys()):
        groups.setdefault(key, []).append(i)
    wanted = _strata(encoded)
    strata: dict[Hashable, list[list[int]]] = {}
    for places in groups.values():
        strata.setdefault(wanted[places[0]], []).append(places)
    if encoded and isinstance(encoded[0], list):  # rare combinations of labels are one stratum
        rare = [name for name, members in strata.items() if len(members) == 1]
        together = [strata.pop(name)[0] for name in rare]
        if together:
            strata["rare"] = together
    dice = random.Random(seed)
    train: list[int] = []
    held: list[int] = []
    for members in strata.values():
        dice.shuffle(members)
        size = min(max(1, round(len(members) * fraction)), len(members) - 1)
        for places in members[:size]:
            held += places
        for places in members[size:]:
            train += places
    repeated = [places for places in groups.values() if len(places) > 1]
    return Split(
        sorted(train),
        sorted(held),
        len(repeated),
        sum(any(encoded[i] != encoded[p[0]] for i in p) for p in repeated),
        [name for name, members in strata.items() if len(members) == 1],
    )


def _strata(encoded: Sequence[Any]) -> list[Hashable]:
    if encoded and isinstance(encoded[0], list):
        return [tuple(row) for row in encoded]
    if encoded and isinstance(encoded[0], float):
        order = sorted(range(len(encoded)), key=lambda i: encoded[i])
        bins: list[Hashable] = [0] * len(encoded)
        for place, i in enumerate(order):
            bins[i] = place * min(_BINS, len(order) // 2 or 1) // len(order)
        return bins
    return list(encoded)


def unseen(train: Examples, held: Examples) -> list[int]:
    """Places of the training rows whose text is not among the held-out ones."""
    known = set(held.keys())
    return [i for i, key in enumerate(train.keys()) if key not in known]


def class_weights(encoded: Sequence[Any], count: int) -> list[float]:
    """Weights under which every class counts alike, 1 on average over the rows.

    For several labels a row they are weights of a label's presence: rows without it a row with it.

    Args:
        encoded: As ``Labels.encode`` gave them, not values.
        count: Of labels.
    """
    if encoded and isinstance(encoded[0], list):
        present = [sum(row[i] for row in encoded) for i in range(count)]
        return [(len(encoded) - n) / n if n else 1.0 for n in present]
    found = Counter(encoded)
    here = len(found)
    return [len(encoded) / (here * found[i]) if found[i] else 0.0 for i in range(count)]
