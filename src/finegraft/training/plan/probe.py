"""A few real steps, and what they say about all the others.

What: ``probe`` runs the first steps of the very run in a folder that is thrown away, and puts what
they took in the place of what was computed. How: ``training.run.train`` with ``max_steps``, so that
model, rows, trainer and saving are the real ones; the events tell seconds, tokens and peak memory.
Constraint: peak memory is that of the process, so one process probes one configuration. Trade-off:
five steps, more where they are short, because the first ones of a small model are mostly kernels
being compiled; memory that grows later (longer rows, more kernels) is still computed.

Units: seconds, bytes.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finegraft.core.schema import TrainConfig
from finegraft.training.events import Listener
from finegraft.training.plan.forecast import Forecast, Study
from finegraft.training.plan.workload import workload

STEPS = 5  # at least
_MOST_STEPS = 200
_SECONDS = 5.0  # of forecast steps
Event = dict[str, Any]


def probe(studied: Study, listener: Listener | None = None) -> Forecast:
    """Forecast of ``studied.config``, corrected by its first steps.

    Args:
        studied: Rows and model of the run.
        listener: Called with the events of the probe.

    Raises:
        FinegraftError: what the run itself would raise.
    """
    config = studied.config
    whole = workload(config, studied.data, flat=studied.model.flat)
    made = studied.of(config)
    each = made.seconds_parts["steps"] / whole.steps
    steps = min(whole.steps, max(STEPS, min(_MOST_STEPS, math.ceil(_SECONDS / each))))
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        if listener is not None:
            listener(event)

    with tempfile.TemporaryDirectory(prefix="finegraft-probe-") as folder:
        changes = {
            "output": str(Path(folder) / "run"),
            "max_steps": steps,
            "logging_steps": 1,
            "save_steps": max(steps, 1),
            "report_to": "none",
        }
        short = config.model_copy(update=changes)
        from finegraft.training import run

        run.train(short, listener=hear)
    return _corrected(studied, short, made, heard)


def _corrected(studied: Study, short: TrainConfig, made: Forecast, heard: list[Event]) -> Forecast:
    few = studied.of(short)
    end = next(e for e in heard if e["type"] == "end")
    parts = dict(made.parts)
    grown = max(0, made.peak_memory_bytes - few.peak_memory_bytes)
    parts["workspace and cache"] += end["peak_memory_bytes"] + grown - made.peak_memory_bytes
    return replace(made, parts=parts, seconds_parts=_seconds(made, few, heard), probed=True)


def _seconds(made: Forecast, few: Forecast, heard: list[Event]) -> dict[str, float]:
    """Seconds of the whole run: what was measured once, and the pace of the later steps."""
    lines = [e for e in heard if e["type"] == "step"]
    end = next(e for e in heard if e["type"] == "end")
    began = next(e["time"] for e in heard if e["type"] == "phase" and e["name"] == "training")
    first, last = lines[0], lines[-1]
    # measured: everything but the steps, of which evaluations and checkpoints come more often
    rest = max(0.0, end["seconds"] - (last["time"] - began))
    computed = few.seconds_parts["evaluations"] + few.seconds_parts["saving"]
    share = rest / max(computed, 1e-9)
    return {
        "starting": first["time"] - began,
        "steps": last["seconds"] - first["seconds"] + (made.steps - len(lines)) * _pace(lines),
        "evaluations": made.seconds_parts["evaluations"] * share,
        "saving": made.seconds_parts["saving"] * share,
    }


def _pace(lines: list[Event]) -> float:
    """Seconds a step in the later half, when most kernels are compiled."""
    middle = lines[(len(lines) - 1) // 2]
    count = lines[-1]["step"] - middle["step"]
    return (lines[-1]["seconds"] - middle["seconds"]) / count if count else lines[0]["seconds"]
