"""Five real steps, and what they say about all the others.

What: ``probe`` runs the first steps of the very run in a folder that is thrown away, and puts what
they took in the place of what was computed. How: ``training.run.train`` with ``max_steps``, so that
model, rows, trainer and saving are the real ones; the events tell seconds, tokens and peak memory.
Constraint: peak memory is that of the process, so one process probes one configuration. Trade-off:
memory that grows after the fifth step (longer rows, more kernels compiled) is still computed.

Units: seconds, bytes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finegraft.core.schema import TrainConfig
from finegraft.training.events import Listener
from finegraft.training.plan import estimate
from finegraft.training.plan.forecast import Forecast, Study, machine
from finegraft.training.plan.workload import Workload, workload

STEPS = 5
Event = dict[str, Any]


def probe(studied: Study, listener: Listener | None = None) -> Forecast:
    """Forecast of ``studied.config``, corrected by its first five steps.

    Args:
        studied: Rows and model of the run.
        listener: Called with the events of the probe.

    Raises:
        FinegraftError: what the run itself would raise.
    """
    config = studied.config
    whole = workload(config, studied.data, flat=studied.model.flat)
    steps = min(STEPS, whole.steps)
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
    return _corrected(studied, short, whole, heard)


def _corrected(studied: Study, short: TrainConfig, whole: Workload, heard: list[Event]) -> Forecast:
    made = studied.of(studied.config)
    few = studied.of(short)
    end = next(e for e in heard if e["type"] == "end")
    seconds_parts = _seconds(studied, short, whole, made, few, heard)
    parts = dict(made.parts)
    if end.get("peak_memory_bytes"):
        grown = made.peak_memory_bytes - few.peak_memory_bytes
        measured = int(end["peak_memory_bytes"]) + max(0, grown)
        parts["workspace and cache"] += measured - made.peak_memory_bytes
    return replace(made, parts=parts, seconds_parts=seconds_parts, probed=True)


def _seconds(
    studied: Study,
    short: TrainConfig,
    whole: Workload,
    made: Forecast,
    few: Forecast,
    heard: list[Event],
) -> dict[str, float]:
    lines = [e for e in heard if e["type"] == "step"]
    first, last = lines[0], lines[-1]
    parts = dict(made.seconds_parts)
    taken = len(lines) * (_pace(lines) if len(lines) > 1 else first["seconds"])
    steps = made.seconds_parts["steps"] * taken / few.seconds_parts["steps"]
    phases = {e["name"]: e["time"] for e in heard if e["type"] == "phase"}
    parts["starting"] = max(0.0, first["time"] - phases["training"])
    parts["steps"] = steps
    end = next(e for e in heard if e["type"] == "end")
    c = estimate.CPU if made.device == "cpu" else estimate.GPU
    here = machine(short, studied.resident)
    once = estimate.evaluation_seconds(studied.model, whole, here, c)
    rest = max(0.0, end["seconds"] - (last["time"] - phases["training"]))
    evaluated = few.seconds_parts["evaluations"]
    saving = few.seconds_parts["saving"]
    share = rest / max(evaluated + saving, 1e-9)
    parts["evaluations"] = made.seconds_parts["evaluations"] * share if once else 0.0
    parts["saving"] = made.seconds_parts["saving"] * share
    return parts


def _pace(lines: list[Event]) -> float:
    """Seconds a step after the first one, by the tokens that the steps had."""
    return (lines[-1]["seconds"] - lines[0]["seconds"]) / (len(lines) - 1)
