"""Which rung of a ladder to take, in one sentence with its reason.

What: ``recommend`` names the method with the fewest trained parameters that is as good as the best.
How: as good means that its interval overlaps the best one's, and that the difference of the two on
the same held-out rows has a 95% interval with 0 in it. Constraint: the second condition is needed,
because intervals of 100 rows are wide: with 62% and 75% right they overlap. Trade-off: trained
parameters are the cost, which are the same on every machine; time and memory stand in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finegraft.training.ladder_report import number
from finegraft.training.rung import bootstrap

BASE = "base"  # the rung of the untrained model
Rung = Mapping[str, Any]


def recommend(rungs: Sequence[Rung], measure: str, better: str) -> dict[str, Any]:
    """Choose a method.

    Args:
        rungs: As ``ladder.row`` makes them, the untrained model called ``base``.
        measure: What their quality is.
        better: ``lower`` or ``higher``.

    Returns:
        ``method`` (None when none is better than the untrained model) and ``reason``, a sentence.
    """
    good = [r for r in rungs if r.get("quality") is not None and r["method"] != BASE]
    if not good:
        return {"method": None, "reason": "No method was trained to the end, see the reasons."}
    sign = 1 if better == "lower" else -1
    base = next((r for r in rungs if r["method"] == BASE and r.get("quality") is not None), None)
    best = min(good, key=lambda r: (sign * r["quality"], r["trainable_parameters"]))
    if base is not None:
        if not _beats(best, base, sign):
            return {
                "method": None,
                "reason": f"No method is better than the untrained model beyond chance: the best "
                f"is {_said(best, measure)}, the untrained model has {_range(base, measure)}; try "
                "more rows, more steps or other learning rates.",
            }
        good = [r for r in good if _beats(r, base, sign)]
    close = [r for r in good if _overlap(r, best) and _level(r, best)]
    cheap = min(close, key=lambda r: (r["trainable_parameters"], sign * r["quality"]))
    if cheap is best:
        words = "is the best, and nothing that trains fewer parameters is as good on the same rows"
        if len(good) == 1:
            words = "is the only method that is better than the untrained model beyond chance"
        return {"method": best["method"], "reason": f"{_said(best, measure)} {words}."}
    return {
        "method": cheap["method"],
        "reason": f"{_said(cheap, measure)} cannot be told apart from the best, "
        f"{_said(best, measure)}, on these rows: {_times(best, cheap)} fewer trained parameters "
        f"and {_time(best, cheap)}, at the price of {_given_up(best, cheap, measure)}.",
    }


def _overlap(one: Rung, other: Rung) -> bool:
    (low, high), (bottom, top) = one["interval"], other["interval"]
    return bool(low <= top and bottom <= high)


def _difference(one: Rung, other: Rung) -> tuple[float, float]:
    """95% interval of the difference in quality, measured on the same rows."""
    pairs = zip(one["rows"]["sums"], other["rows"]["sums"], strict=True)
    return bootstrap([a - b for a, b in pairs], one["rows"]["weights"])


def _level(one: Rung, other: Rung) -> bool:
    low, high = _difference(one, other)
    return low <= 0 <= high


def _beats(one: Rung, other: Rung, sign: int) -> bool:
    low, high = _difference(one, other)
    return high < 0 if sign > 0 else low > 0


def _said(rung: Rung, measure: str) -> str:
    return f"{rung['method']} with a held-out {measure} of {_range(rung, measure)}"


def _range(rung: Rung, measure: str) -> str:
    low, high = rung["interval"]
    numbers = [number(x, measure) for x in (rung["quality"], low, high)]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def _times(best: Rung, cheap: Rung) -> str:
    ratio = best["trainable_parameters"] / max(cheap["trainable_parameters"], 1)
    return f"{ratio:,.0f} times" if ratio >= 2 else f"{1 - 1 / ratio:.0%}"


def _time(best: Rung, cheap: Rung) -> str:
    saved = best["seconds"] - cheap["seconds"]
    words = "less" if saved >= 0 else "more"
    return f"{abs(saved):,.0f} s {words} training"


def _given_up(best: Rung, cheap: Rung, measure: str) -> str:
    lost = abs(best["quality"] - cheap["quality"])
    words = f"{lost * 100:.1f} points" if measure == "accuracy" else f"{lost:.4f}"
    return f"{words} of {measure}"
