"""What a worker of a Ray job does: the run, told to the process that started the job.

What: ``work`` is what Ray calls; it goes on with a run of its own job, or with what the storage
holds, and calls ``run.train``. How: a file in the run folder names the job that made it, so that a
worker which was started again knows its run from one that must not be touched. Constraint: a
deliberate error is an answer, not an exception, or Ray would try it again. Trade-off: every event
waits until the actor has taken it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError
from finegraft.core.paths import write_whole
from finegraft.core.process import keep_freed_memory
from finegraft.core.schema import TrainConfig, build
from finegraft.training import run
from finegraft.training.distributed import world
from finegraft.training.ray_storage import Store

MARK = ".ray-job"  # in a run folder: the job that made it


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Be one of the workers.

    Args:
        job: ``id``, ``config``, ``storage``, and ``send``, which takes an event and answers whether
            the run is to stop.

    Returns:
        ``{"result": ...}`` or ``{"error": ...}``.
    """
    keep_freed_memory()
    config = build(job["config"])
    folder, main = Path(config.output), world.here().main
    store = Store(job["storage"], folder.name) if job["storage"] else None
    telling = _Telling(job, config, store if main else None)
    try:
        resume = _going_on(job, config, store, telling)
        result = run.train(config, listener=telling if main else None, resume=resume)
        if store and main:
            store.finish(folder)
        return {"result": _plain(result)}
    except FinegraftError as error:
        return {"error": {**error.as_dict(), "kind": type(error).__name__}}
    except KeyboardInterrupt:
        return {"result": _stopped(folder, telling)}


def _going_on(
    job: dict[str, Any], config: TrainConfig, store: Store | None, telling: _Telling
) -> bool:
    """Whether this start goes on with a run: one of this job, or the one in the storage."""
    folder = Path(config.output)
    if store and store.latest() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        mine = _made_by(folder, job["id"])
        if mine or not (folder / "config.yaml").is_file():
            store.fetch(folder, telling.notice)
            write_whole(folder / MARK, job["id"])
    world.wait()
    return _made_by(folder, job["id"]) and (folder / "data.json").is_file()


def _made_by(folder: Path, job: str) -> bool:
    mark = folder / MARK
    return mark.is_file() and mark.read_text(encoding="utf-8") == job


class _Telling:
    """The first worker's listener: marks the folder, sends events, copies checkpoints."""

    def __init__(self, job: dict[str, Any], config: TrainConfig, store: Store | None):
        self.job = job
        self.config = config
        self.store = store
        self.step, self.total = 0, 0
        self.loss: float | None = None

    def notice(self, words: str) -> None:
        """Send words of this module."""
        self({"type": "notice", "time": round(time.time(), 3), "message": words})

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the run."""
        folder = Path(self.config.output)
        if event["type"] == "run":  # the folder is there, and is this job's
            write_whole(folder / MARK, self.job["id"])
        elif event["type"] == "step":
            self.step, self.total = event["step"], event["total_steps"]
            self.loss = event["loss"]
        elif event["type"] == "save" and self.store:
            self.store.keep(folder, event["step"], keep=self.config.save_total_limit)
        stop = self.job["send"](event)
        if stop and event["type"] in ("step", "phase"):
            raise KeyboardInterrupt


def _plain(result: Any) -> dict[str, Any]:
    """A result without the model, which stays where it was trained."""
    keys = ("steps", "total_steps", "loss", "eval_loss", "seconds", "tokens", "interrupted", "task")
    values = {key: getattr(result, key) for key in keys}
    adapter = str(result.adapter) if result.adapter else None
    return {**values, "metrics": result.metrics, "run": str(result.run), "adapter": adapter}


def _stopped(folder: Path, telling: _Telling) -> dict[str, Any]:
    return {
        "steps": telling.step,
        "total_steps": telling.total,
        "loss": telling.loss,
        "eval_loss": None,
        "seconds": 0.0,
        "tokens": 0,
        "interrupted": True,
        "task": telling.config.task,
        "metrics": None,
        "run": str(folder),
        "adapter": None,
    }
