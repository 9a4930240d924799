"""What a run folder tells, read without torch.

What: ``summary`` for a line in a table, ``history`` for curves. How: the last event of each kind is
searched from the end of ``events.jsonl``, which is mapped, not read; a history keeps every event
but the steps, and of those an even choice. Constraint: ``events.jsonl`` is the only source; files
of runs from before the ``run`` event was written fall back on ``config.yaml``. Trade-off: a spike
between two kept steps of a very long run is not in its curve.

Units: seconds, bytes, steps; losses in nats a token.
"""

from __future__ import annotations

import json
import mmap
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from finegraft.core.errors import ConfigError, did_you_mean

Event = dict[str, Any]
EVENTS = "events.jsonl"
MOST_STEPS = 2000
_ENDINGS = {"end": "finished", "interrupted": "stopped", "stopped": "stopped", "failed": "failed"}
# A run without a process number, or on another computer, counts as running for as long after its
# last event.
_QUIET_SECONDS = 120.0
_START_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True)
class Summary:
    """One run in one line.

    Attributes:
        state: waiting (no step yet), running, stopped (resumable), finished, failed or killed.
        started: Seconds since 1970.
        seconds: Of training.
        tokens_per_second: Over the whole run when it is finished, else lately.
        error: Code of what ended it, when it failed.
    """

    name: str
    path: Path
    state: str
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    started: float | None
    seconds: float | None
    model: str | None
    method: str | None
    task: str | None
    data: str | None
    error: str | None


class Tail:
    """The last event of each kind, found from the end of a file.

    Args:
        path: An ``events.jsonl``; one that is missing or empty has no events.
    """

    def __init__(self, path: Path):
        self._bytes: Any = b""
        try:
            with open(path, "rb") as handle:
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: nothing to map in an empty file
            return

    def last(self, kind: str) -> tuple[int, Event]:
        """Position and content of the last event of a kind; -1 and nothing without one."""
        mark, end = b'{"type": "' + kind.encode() + b'"', len(self._bytes)
        while (at := self._bytes.rfind(mark, 0, end)) >= 0:
            event = _parsed(self._line(at)) if self._begins_line(at) else None
            if event is not None:
                return at, event
            end = at
        return -1, {}

    def ends(self) -> tuple[Event, Event]:
        """The first and the last event that can be read."""
        first = _parsed(self._line(0)) if len(self._bytes) else None
        end = len(self._bytes)
        while end > 0:
            at = self._bytes.rfind(b"\n", 0, end - 1) + 1
            event = _parsed(self._bytes[at:end])
            if event is not None:
                return first or event, event
            end = at
        return first or {}, first or {}

    def _begins_line(self, at: int) -> bool:
        return at == 0 or self._bytes[at - 1 : at] == b"\n"

    def _line(self, at: int) -> bytes:
        end = self._bytes.find(b"\n", at)
        return bytes(self._bytes[at:] if end < 0 else self._bytes[at:end])


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "type" in event else None


def runs(folder: Path) -> list[Path]:
    """Run folders in ``folder``, or itself if it is one; ladders keep theirs one folder deeper."""
    if is_run(folder):
        return [folder]
    found = [
        path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{EVENTS}")
    ]
    return sorted({path for path in found if not any(p.startswith(".") for p in path.parts)})


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's events or settings."""
    return any((folder / name).is_file() for name in (EVENTS, "config.yaml"))


def require_run(folder: Path) -> Path:
    """Return ``folder`` if a run with events is in it.

    Raises:
        ConfigError: FG-RUN-020, there is none.
    """
    if (folder / EVENTS).is_file():
        return folder
    around = {
        path for place in (folder.parent, Path("runs")) for path in runs(place) if place.is_dir()
    }
    names = sorted(str(path) for path in around)
    raise ConfigError(
        "FG-RUN-020",
        f"no run in {folder}: it has no {EVENTS}",
        allowed=", ".join(names[:12]) or "a folder that `finegraft train` made",
        fix=did_you_mean(str(folder), names) if names else "`finegraft runs` lists what there is",
    )


def summary(run: Path) -> Summary:
    """Read one run; takes milliseconds, also for hundreds of thousands of events."""
    tail = Tail(run / EVENTS)
    first, last = tail.ends()
    begun, about = tail.last("run")
    started_at, start = tail.last("start")
    _, step = tail.last("step")
    evaluated, held_out = tail.last("eval")
    endings = {kind: tail.last(kind) for kind in _ENDINGS}
    at, ending = max(endings.values(), key=lambda pair: pair[0])
    over = ending if at > max(begun, started_at) else {}
    config = about.get("config") or _settings(run)
    metrics = over.get("metrics") or {}
    return Summary(
        name=run.name,
        path=run,
        state=_state(over, about, last, bool(step)),
        step=int(over.get("step") or step.get("step") or 0),
        total_steps=step.get("total_steps") or start.get("total_steps"),
        loss=step.get("loss"),
        eval_loss=metrics.get("loss", held_out.get("loss")) if evaluated >= 0 or metrics else None,
        tokens_per_second=_speed(over, step),
        started=first.get("time"),
        seconds=over.get("seconds", step.get("seconds")),
        model=config.get("model"),
        method="full" if config.get("full_finetuning") else config.get("method"),
        task=config.get("task"),
        data=_data_words(config.get("data")),
        error=over.get("code"),
    )


def _data_words(data: Any) -> str | None:
    """``data`` of a configuration in a few words, also where it is a list of sources."""
    if data is None or isinstance(data, str):
        return data
    parts = data if isinstance(data, list) else [data]
    return ", ".join(str(p.get("path", p)) if isinstance(p, dict) else str(p) for p in parts)


def _speed(over: Event, step: Event) -> float | None:
    if over.get("tokens") and over.get("seconds"):
        return round(over["tokens"] / over["seconds"], 1)
    return step.get("tokens_per_second")


def _state(over: Event, about: Event, last: Event, trained: bool) -> str:
    if over:
        return _ENDINGS[over["type"]]
    if not _alive(about, last):
        return "killed"
    return "running" if trained else "waiting"


def _alive(about: Event, last: Event) -> bool:
    """Whether the process that writes the events is still there."""
    process = about.get("process") or {}
    if process.get("host") != socket.gethostname() or "pid" not in process:
        return time.time() - last.get("time", 0.0) < _QUIET_SECONDS
    try:
        began = psutil.Process(process["pid"]).create_time()
    except psutil.Error:
        return False
    return abs(began - process["started"]) < _START_TOLERANCE_SECONDS


def _settings(run: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


@dataclass(frozen=True)
class History:
    """All events of a run by kind, steps in rising order, each once.

    Attributes:
        stride: Every how many logged steps one was kept.
    """

    run: Path
    events: dict[str, list[Event]]
    stride: int

    def of(self, kind: str) -> list[Event]:
        """Events of one kind, oldest first."""
        return self.events.get(kind, [])

    def last(self, kind: str) -> Event:
        """The newest event of a kind, or nothing."""
        return (self.of(kind) or [{}])[-1]

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the newest start of the run."""
        return self.last("run").get("config") or _settings(self.run)


def history(run: Path, most: int = MOST_STEPS) -> History:
    """Read the whole of a run.

    Args:
        most: Steps kept; more are thinned out evenly, the last one always kept.
    """
    lines = (run / EVENTS).read_bytes().split(b"\n")
    is_step = [line.startswith(b'{"type": "step"') for line in lines]
    stride = -(-sum(is_step) // most) or 1
    events: dict[str, list[Event]] = {}
    for event in _chosen(lines, is_step, stride):
        kept = events.setdefault(event["type"], [])
        if event["type"] in ("step", "eval"):  # a resumed run tells steps again
            while kept and kept[-1]["step"] >= event["step"]:
                kept.pop()
        kept.append(event)
    return History(run, events, stride)


def _chosen(lines: list[bytes], is_step: list[bool], stride: int) -> Iterator[Event]:
    left, number = sum(is_step), 0
    for line, step in zip(lines, is_step, strict=True):
        if step:
            number, left = number + 1, left - 1
            if number % stride and left:
                continue
        event = _parsed(line) if line else None
        if event is not None:
            yield event
