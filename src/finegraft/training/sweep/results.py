"""What a sweep found: the runs in order, and what to bear in mind when comparing them.

What: ``summary`` makes the values of ``sweep.json``. How: finished runs by loss, then pruned ones,
then failed ones. Constraint: losses of different held-out rows are told as that; the digests of the
rows say so, not the names of the keys. Trade-off: the notes are words, for people; a program has
the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finegraft.training.sweep.one import LAST_LINES
from finegraft.training.sweep.planning import Plan
from finegraft.training.sweep.space import Axis, shown

_STATES = ("finished", "pruned", "failed")
_ENOUGH = 3  # values of a key, for one of them to lie at an end


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best run first; those without a loss last."""

    def rank(row: Mapping[str, Any]) -> tuple[int, float]:
        loss = row["loss"]
        good = loss is not None and math.isfinite(loss)
        return _STATES.index(row["state"]), loss if good else math.inf

    return sorted(rows, key=rank)


def summary(planned: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``sweep.json`` holds."""
    runs = ordered(rows)
    best = runs[0] if runs and runs[0]["loss"] is not None else None
    return {
        "sweep": str(planned.folder),
        "task": planned.values.get("task", "causal"),
        "model": planned.values.get("model"),
        "data": planned.data.get("path"),
        "rows": planned.data.get("counts", {}).get("rows"),
        "search": "optuna" if planned.trials else "grid",
        "varied": {axis.key: axis.written() for axis in planned.space},
        "measure": planned.measure,
        "of": planned.count,
        "runs": runs,
        "best": best and {key: best[key] for key in ("name", "values", "loss", "run")},
        "notes": _notes(planned, runs, best),
    }


def measure_words(measure: str) -> str:
    """What runs are ordered by."""
    return "held-out loss" if measure == "eval_loss" else "training loss"


def _notes(
    planned: Plan, runs: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None
) -> list[str]:
    notes = []
    finished = [row for row in runs if row["state"] == "finished"]
    if not planned.held_out:
        notes.append(
            "No rows are held out, so runs are ordered by the training loss, the mean of the last "
            f"{LAST_LINES} logged lines, which says little about unseen rows; eval_fraction: 0.1 "
            "holds some out."
        )
    elif len({words for row in finished if (words := _held_out_rows(row))}) > 1:
        notes.append(
            "What is varied changes the held-out rows as well (their tokens or which ones they "
            "are), so the losses of different runs are not of the same thing."
        )
    if best and len(finished) > 1:
        notes += [words for axis in planned.space if (words := _at_the_end(axis, best))]
    return notes


def _held_out_rows(row: Mapping[str, Any]) -> str | None:
    file = Path(row["run"]) / "data.json"
    if not file.is_file():
        return None
    digests = json.loads(file.read_text(encoding="utf-8")).get("digests", {})
    found = digests.get("held_out")
    return str(found["order"]) if found else None


def _at_the_end(axis: Axis, best: Mapping[str, Any]) -> str | None:
    """Whether the best value of a key is the least or the greatest that was tried."""
    values = [v for v in axis.values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(values) < max(_ENOUGH, len(axis.values)):
        return None
    value = best["values"][axis.key]
    for end, word in ((min(values), "least"), (max(values), "greatest")):
        if value == end:
            further = "lower" if word == "least" else "higher"
            return (
                f"The best {axis.key} ({shown(value)}) is the {word} that was tried; a {further} "
                "one may be better still."
            )
    return None
