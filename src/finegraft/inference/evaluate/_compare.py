"""Values with intervals, of one model or of two on the same rows.

What: ``compare`` for all measures, ``pairwise`` for the question which of two answers is closer to
the reference, ``changed`` for the rows on which two models differ most. How: every measure is sums
of rows and a total (``_contract``); rows are drawn anew for intervals, the same rows for both
models, so that a difference is a paired one. Constraint: losses of models that cut text into other
tokens are not compared, because a token is not the same unit there. Trade-off: "closer to the
reference" is chrF, which knows letters and not meaning; it needs no judge and repeats exactly.

Shapes: n rows, k sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from finegraft.core.intervals import bootstrap, bootstrap_difference, wilson
from finegraft.inference.evaluate._contract import Answered, Metric
from finegraft.inference.evaluate.chrf import METRIC as CHRF

_SAME = 1e-9  # points of chrF below which two answers are a tie


def _read(metric: Metric, rows: Answered) -> Answered:
    """The rows that a measure can be computed on."""
    return rows if metric.reads == "losses" else rows.select(rows.asked())


def _interval(metric: Metric, sums: np.ndarray) -> list[float]:
    if metric.share:
        return list(wilson(metric.total(sums.sum(0)), len(sums)))
    return list(bootstrap(sums, metric.total))


def _change(metric: Metric, low: float, high: float) -> Literal["better", "worse", "unclear"]:
    """What a difference's interval says; one that holds 0 says nothing."""
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == (metric.better == "more") else "worse"


def same_tokens(rows: Answered, other: Answered) -> bool:
    """Whether the losses of both count the same tokens, so that they can be compared."""
    if rows.losses is None or other.losses is None:
        return True
    return bool(np.array_equal(rows.losses[:, 1], other.losses[:, 1]))


def compare(
    metrics: Mapping[str, Metric], rows: Answered, other: Answered | None = None
) -> dict[str, dict[str, Any]]:
    """Compute every measure, of one model or of two on the same rows.

    Args:
        metrics: Measures by name.
        rows: What the model did.
        other: What the model that it is compared with did.

    Returns:
        By name: ``value``, ``interval`` (95%), ``rows``, ``better`` (more or less); with ``other``
        also ``other``, ``other_interval``, ``difference``, ``difference_interval`` and ``change``
        (better, worse, or unclear where the interval of the difference holds 0).
    """
    found = {}
    for name, metric in metrics.items():
        sums = metric.sums(_read(metric, rows))
        others = metric.sums(_read(metric, other)) if other is not None else None
        comparable = other is None or metric.reads == "answers" or same_tokens(rows, other)
        found[name] = judged(metric, sums, others, comparable)
    return found


def judged(
    metric: Metric, sums: np.ndarray, others: np.ndarray | None = None, comparable: bool = True
) -> dict[str, Any]:
    """The keys of ``compare`` for one measure.

    Args:
        sums: Of the model, [n, k].
        others: Of the model that it is compared with, [n, k].
        comparable: Whether the two have the same unit, so that a difference says something.
    """
    one: dict[str, Any] = {
        "value": metric.total(sums.sum(0)),
        "interval": _interval(metric, sums),
        "rows": len(sums),
        "better": metric.better,
    }
    if others is not None:
        one["other"] = metric.total(others.sum(0))
        one["other_interval"] = _interval(metric, others)
    if others is not None and comparable:
        low, high = bootstrap_difference(sums, others, metric.total)
        one["difference"] = one["value"] - one["other"]
        one["difference_interval"] = [low, high]
        one["change"] = _change(metric, low, high)
    return one


def each_row(metric: Metric, rows: Answered) -> list[float | None]:
    """The measure of every row by itself; None where it has none."""
    values: list[float | None] = [None] * len(rows.prompts)
    places = range(len(rows.prompts)) if metric.reads == "losses" else rows.asked()
    for place, sums in zip(places, metric.sums(_read(metric, rows)), strict=True):
        values[place] = metric.total(sums)
    return values


def pairwise(rows: Answered, other: Answered) -> dict[str, Any]:
    """Count the rows on which the model's answer is closer to the reference than the other's.

    Returns:
        ``wins``, ``ties``, ``losses``, ``win_rate`` (ties count half) and its 95% ``interval``;
        0.5 is a draw.

    Raises:
        ImportError: sacrebleu is not installed; see ``require_package``.
    """
    pairs = zip(each_row(CHRF, rows), each_row(CHRF, other), strict=True)
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    wins, losses = sum(g > _SAME for g in gaps), sum(g < -_SAME for g in gaps)
    ties = len(gaps) - wins - losses
    rate = (wins + ties / 2) / len(gaps)
    return {
        "by": "chrf",
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "win_rate": rate,
        "interval": list(wilson(rate, len(gaps))),
    }


def changed(metric: Metric, rows: Answered, other: Answered, count: int) -> dict[str, list[int]]:
    """Places of the rows on which the model gained and lost most.

    Returns:
        ``gains`` and ``losses``, the largest first, at most ``count`` each; a row whose measure is
        the same for both is in neither.
    """
    sign = 1.0 if metric.better == "more" else -1.0
    gaps = [
        (sign * (a - b), place)
        for place, (a, b) in enumerate(
            zip(each_row(metric, rows), each_row(metric, other), strict=True)
        )
        if a is not None and b is not None
    ]
    order = sorted(gaps, key=lambda gap: (-gap[0], gap[1]))
    return {
        "gains": [place for gap, place in order if gap > _SAME][:count],
        "losses": [place for gap, place in reversed(order) if gap < -_SAME][:count],
    }
