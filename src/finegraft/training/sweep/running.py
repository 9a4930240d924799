"""A sweep at work: one run after the other, each in a process of its own.

What: ``sweep`` trains what is not done yet and returns the runs in order of their loss. How: every
run is a run folder, trained by ``sweep.one`` and watched by ``ladder_worker.work``; its events feed
the judge of a search. Constraint: whatever ends this process, the same call goes on: a finished run
is kept, the interrupted one is resumed from its newest checkpoint, a failed one is tried again.
Trade-off: some seconds a run for a new process, so that a crash costs one run and memory is each
run's own.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finegraft.core.alone import alone, in_use
from finegraft.core.errors import FinegraftError, ModelError
from finegraft.core.journal import read_events
from finegraft.core.paths import require_writable, write_whole
from finegraft.training.events import Listener
from finegraft.training.ladder_worker import Clock, work
from finegraft.training.sweep import page, search
from finegraft.training.sweep.one import settled
from finegraft.training.sweep.planning import Plan, names
from finegraft.training.sweep.results import ordered, summary
from finegraft.training.sweep.space import grid, label

MODULE = "finegraft.training.sweep.one"
_LOOK_SECONDS = 0.5
Values = dict[str, Any]


def sweep(planned: Plan, *, listener: Listener | None = None) -> dict[str, Any]:
    """Train what is not done yet; write sweep.json and index.html after each run.

    Args:
        planned: From ``planning.plan``.
        listener: Called with the events of every run, a ``rung`` event before each and a ``result``
            event after it; all carry ``method`` (the values in words), ``number``, ``of`` and
            ``ladder_seconds`` (left for the whole sweep), as those of a ladder do.

    Returns:
        What ``sweep.json`` holds, see docs/sweep.md.

    Raises:
        KeyboardInterrupt: Stopped; the same call goes on.
        ConfigError: FG-RUN-004, another process works on this sweep.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    require_writable(planned.folder / "results")
    with alone(planned.folder):
        if planned.overwrite:
            _clear(planned)
        write_whole(planned.folder / "sweep.yaml", planned.rerunnable())
        return _Sweep(planned, listener).run()


def _clear(planned: Plan) -> None:
    """Remove what is there of every run."""
    for name in names(planned):
        shutil.rmtree(planned.folder / name, ignore_errors=True)
        for file in planned.files(name):
            file.unlink(missing_ok=True)


class _Sweep:
    """The state of one call of ``sweep``."""

    def __init__(self, planned: Plan, listener: Listener | None):
        self.planned = planned
        self.listener = listener
        self.clock = Clock(planned.count)
        self.combinations = None if planned.trials else grid(planned.space)
        self.past: list[search.Past] = []
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, name in enumerate(names(self.planned), 1):
            known = _known(self.planned, name)
            values, judge = self._values(number, name, known)
            place = {"method": label(values), "number": number, "of": self.planned.count}
            self.clock.begin(number)
            self._tell(place, type="rung", how="done already" if known else "starting")
            result = known or self._train(name, values, judge, place)
            row = _row(self.planned, name, values, result)
            self.rows.append(row)
            self.past.append(_past(self.planned, row))
            found = summary(self.planned, self.rows)
            write_whole(self.planned.folder / "sweep.json", json.dumps(found, indent=2) + "\n")
            page.write(found, self.planned.folder)
            self._tell(place, type="result", row=row, best=ordered(self.rows)[0])
        return found

    def _tell(self, place: Mapping[str, Any], **event: Any) -> None:
        if self.listener:
            self.listener({**event, **place, "ladder_seconds": self.clock.left()})

    def _values(
        self, number: int, name: str, known: dict[str, Any] | None
    ) -> tuple[Values, search.Judge | None]:
        """What the run is given; a trial that was begun keeps what it has."""
        if self.combinations is not None:
            return self.combinations[number - 1], None
        settings, _ = self.planned.files(name)
        begun = None
        if settings.is_file() and (known or (self.planned.folder / name / "data.json").is_file()):
            written = yaml.safe_load(settings.read_text(encoding="utf-8"))
            begun = {axis.key: written[axis.key] for axis in self.planned.space}
        if known and begun:
            return begun, None
        return search.propose(self.planned.space, self.past, self.planned.seed, begun)

    def _train(
        self, name: str, values: Values, judge: search.Judge | None, place: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            config = self.planned.config(values, name)
        except FinegraftError as error:  # values that are good alone, but not together
            return {"error": error.as_dict()}
        settings, target = self.planned.files(name)
        folder = self.planned.folder / name
        self._wait_for(folder, place)
        target.unlink(missing_ok=True)
        write_whole(settings, config.to_yaml())
        following = _Following(self.planned.held_out, judge)
        how = "resume" if (folder / "data.json").is_file() else "new"
        if (folder / "events.jsonl").is_file():
            for event in read_events(folder / "events.jsonl"):
                following(event)

        def tell(event: dict[str, Any]) -> None:
            self.clock.hear(event)
            following(event)
            self._tell({**event, **place})

        result = work(
            settings,
            target,
            how,
            folder / "events.jsonl",
            tell,
            module=MODULE,
            stop=(lambda: judge.hopeless) if judge else None,
            broke_off=_broke_off,
        )
        self.clock.end()
        if result.get("stopped"):
            result = {"pruned": True, **following.so_far()}
            write_whole(target, json.dumps(result, indent=2) + "\n")
        return result

    def _wait_for(self, folder: Path, place: dict[str, Any]) -> None:
        """A sweep that was killed leaves a run that saves and ends at its next step."""
        told = False
        while folder.is_dir() and in_use(folder):
            if not told:
                words = f"waiting for the process that still works on {folder}"
                self._tell(place, type="notice", message=words)
            told = True
            time.sleep(_LOOK_SECONDS)


class _Following:
    """What the events of one run say of its loss so far.

    Args:
        held_out: Whether the held-out loss counts, or the loss in training.
        judge: Told every loss; None: nobody.
    """

    def __init__(self, held_out: bool, judge: search.Judge | None = None):
        self.held_out = held_out
        self.judge = judge
        self.step, self.total = 0, 0
        self.losses: list[float] = []
        self.measured: float | None = None
        self.curve: dict[int, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        if event["type"] == "start":
            self.total = event["total_steps"]
        elif event["type"] == "step":
            self.step = event["step"]
            self.losses.append(event["loss"])
            if not self.held_out:
                self._note(event["step"], settled(self.losses))
        elif event["type"] == "eval":
            self.measured = event["loss"]
            if self.held_out:
                self._note(event["step"], event["loss"])

    def _note(self, step: int, loss: float | None) -> None:
        if loss is None or not self.total:
            return
        place = round(search.PLACES * step / self.total)
        self.curve[place] = loss
        if self.judge:
            self.judge.hear(place, loss)

    def so_far(self) -> dict[str, Any]:
        """The numbers of a run that was stopped early."""
        return {
            "steps": self.step,
            "total_steps": self.total,
            "train_loss": settled(self.losses),
            "eval_loss": self.measured,
        }


def _known(planned: Plan, name: str) -> dict[str, Any] | None:
    """The result of a run that is done; failures are tried again."""
    _, file = planned.files(name)
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return None if "error" in found else dict(found)


def _row(planned: Plan, name: str, values: Values, result: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of ``runs`` in sweep.json."""
    keys = (
        "train_loss",
        "eval_loss",
        "eval_step",
        "metrics",
        "steps",
        "total_steps",
        "seconds",
        "trainable_parameters",
        "peak_memory_bytes",
        "error",
    )
    state = "failed" if result.get("error") else "pruned" if result.get("pruned") else "finished"
    return {
        "name": name,
        "values": values,
        "state": state,
        "loss": result.get(planned.measure) if state == "finished" else None,
        **{key: result.get(key) for key in keys},
        "run": str(planned.folder / name),
    }


def _past(planned: Plan, row: Mapping[str, Any]) -> search.Past:
    following = _Following(planned.held_out)
    events = Path(row["run"]) / "events.jsonl"
    for event in read_events(events) if events.is_file() else ():
        following(event)
    pruned = row["state"] == "pruned"
    return search.Past(row["values"], following.curve, row["loss"], pruned)


def _broke_off(words: str, log: Path) -> FinegraftError:
    return ModelError(
        "FG-SWEEP-009",
        f"the run broke off: {words}",
        fix=f"see {log}; a smaller --per-device-train-batch-size takes less memory",
    )
