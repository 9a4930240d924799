"""Perplexity: e to the held-out loss, the number of tokens the model as good as guesses among."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finegraft.inference.evaluate._contract import Metric, losses_of, mean

if TYPE_CHECKING:
    import numpy as np

_LARGEST = 700.0  # e to more than this is no float


def _total(row: np.ndarray) -> float:
    return math.exp(min(mean(row), _LARGEST))


METRIC = Metric(
    about="e to the loss: among how many tokens the model as good as guesses; 1 is certainty",
    sums=losses_of,
    total=_total,
    better="less",
    reads="losses",
)
