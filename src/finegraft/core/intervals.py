"""How far a measure may be off, from the rows that it was measured on.

What: 95% intervals by Wilson's formula for shares, and by drawing the rows anew for everything that
is computed from sums over rows. How: each row is a vector of sums, k numbers; a draw adds rows up
and computes the measure from the total, so that corpus measures (BLEU, F1, perplexity) get the same
treatment as means. Constraint: the same rows give the same interval. Trade-off: the interval tells
of other rows of the same kind, not of other seeds of the training, which differ as well.

Shapes: n rows, k sums, d draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DRAWS = 1000
_Z = 1.959964  # standard deviations around the mean that hold 95% of a normal distribution
_CHUNK_CELLS = 4_000_000  # draws times rows that are held at once

Interval = tuple[float, float]
Total = Callable[["np.ndarray"], float]


def wilson(share: float, count: int) -> Interval:
    """95% interval of a share that was found in ``count`` rows; 0 and 1 have one as well.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    square = _Z * _Z / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def drawn_totals(sums: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sums [d, k] of n rows drawn from ``sums`` [n, k] with replacement, d times.

    Two calls with the same number of rows draw the same rows, which is what makes the difference of
    two models on the same rows a paired one.
    """
    import numpy as np

    dice = np.random.default_rng(seed)
    rows = len(sums)
    shares = np.full(rows, 1.0 / rows)
    step = max(1, _CHUNK_CELLS // rows)
    parts = []
    for start in range(0, draws, step):
        counts = dice.multinomial(rows, shares, size=min(step, draws - start))  # [d, n]
        parts.append(counts.astype(np.float64) @ sums)
    return np.concatenate(parts)


def _middle(values: list[float]) -> Interval:
    import numpy as np

    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(sums: np.ndarray, total: Total, draws: int = DRAWS) -> Interval:
    """95% interval of ``total(sums.sum(0))``.

    Args:
        sums: What each row adds, [n, k].
        total: The measure from added-up sums, [k].
        draws: How often the rows are drawn anew.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979; for measures of a
    corpus Koehn, "Statistical significance tests for machine translation evaluation", 2004.
    """
    return _middle([total(row) for row in drawn_totals(sums, draws)])


def bootstrap_difference(
    sums: np.ndarray, others: np.ndarray, total: Total, draws: int = DRAWS
) -> Interval:
    """95% interval of ``total(sums) - total(others)``, both of the same drawn rows.

    Args:
        sums: Of one model, [n, k].
        others: Of the other on the same rows, [n, k].
    """
    pairs = zip(drawn_totals(sums, draws), drawn_totals(others, draws), strict=True)
    return _middle([total(one) - total(other) for one, other in pairs])
