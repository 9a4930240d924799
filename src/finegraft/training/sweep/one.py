"""One run of a sweep, in a process of its own.

What: ``python -m finegraft.training.sweep.one SETTINGS.yaml RESULT.json new|resume PID`` trains one
configuration with ``run.train`` and writes the numbers that runs are compared by. How: the process
is that of a ladder's rung (``training.rung``); the numbers come from the run's own events.
Constraint: nothing is measured that the run does not measure itself, so a sweep's run is a run like
any other. Trade-off: the last batch alone says little, so the training loss is the mean of the last
``LAST_LINES`` logged ones.

Units: losses in nats a token, seconds of training, bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from finegraft.core.journal import by_step, read_events
from finegraft.core.schema import TrainConfig
from finegraft.training import run, rung

LAST_LINES = 10


def settled(losses: Sequence[float]) -> float | None:
    """The loss that a run has come to: the mean of its last logged ones."""
    last = [loss for loss in losses[-LAST_LINES:] if loss is not None]
    return sum(last) / len(last) if last else None


def train(config: TrainConfig, how: str, orphan: rung.Orphan) -> dict[str, Any] | None:
    """Train one configuration.

    Args:
        config: Of the run.
        how: ``new`` or ``resume``.
        orphan: Ends it when nobody waits for it any more.

    Returns:
        What a sweep keeps of a run; None when training was interrupted.

    Raises:
        FinegraftError: of the part that found the problem.
    """
    result = run.train(config, listener=orphan, resume=how == "resume")
    if result.interrupted:
        return None
    events = read_events(result.run / "events.jsonl")
    measured = by_step(events, "eval")
    start = next((e for e in reversed(events) if e["type"] == "start"), {})
    end = next((e for e in reversed(events) if e["type"] == "end"), {})
    return {
        "steps": result.steps,
        "total_steps": result.total_steps,
        "train_loss": settled([e["loss"] for e in by_step(events, "step")]),
        "eval_loss": result.eval_loss,
        "eval_step": measured[-1]["step"] if measured else None,
        "metrics": _numbers(result.metrics or {}),
        "seconds": rung.training_seconds(events),
        "trainable_parameters": start.get("trainable"),
        "peak_memory_bytes": end.get("peak_memory_bytes"),
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, int | float)}


if __name__ == "__main__":
    sys.exit(rung.main(sys.argv[1:], train))
