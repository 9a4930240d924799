"""What a run has told so far, kept as it grows.

What: ``Record`` reads new bytes of an ``events.jsonl`` only and keeps the curves as arrays and the
last events of every other kind; ``thinned`` makes of a curve as many points as a chart shows. How:
steps are parsed many lines at a time, buckets of a curve give their least and greatest value.
Constraint: no extreme is lost, however few points are asked for, and values that are no numbers
stay. Trade-off: 16 bytes a logged step and curve stay in memory for the runs looked at last.

Units: steps; losses in nats a token; bytes; tokens a second.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Event = dict[str, Any]
Points = list[list[float | None]]
EVENTS = "events.jsonl"
STEP_FIELDS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
_PIECE_BYTES = 8 << 20
_KEPT = 200  # events of a kind that is no step
_KEPT_RECORDS = 12
_NOT_NUMBERS = 50  # points of a curve that are no numbers
_STEP, _EVAL = b'{"type": "step"', b'{"type": "eval"'


class Curve:
    """Values by step, in rising order; a step that is told again replaces what follows it."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def extend(self, pairs: list[tuple[int, float]]) -> None:
        """Add points."""
        steps = [step for step, _ in pairs]
        after = self.steps[-1] if self.steps else -1
        rising = all(a < b for a, b in itertools.pairwise(steps))
        if rising and (not steps or steps[0] > after):
            self.steps.extend(steps)
            self.values.extend(value for _, value in pairs)
            return
        for step, value in pairs:
            if self.steps and step <= self.steps[-1]:
                keep = bisect.bisect_left(self.steps, step)
                del self.steps[keep:], self.values[keep:]
            self.steps.append(step)
            self.values.append(value)

    def thinned(self, points: int) -> Points:
        """At most about ``points`` of them, with the extremes of every stretch."""
        steps, values = np.array(self.steps), np.array(self.values)
        chosen = _chosen(values, points)
        return [
            [int(steps[i]), float(values[i]) if math.isfinite(values[i]) else None] for i in chosen
        ]


def _chosen(values: np.ndarray, points: int) -> Iterable[int]:
    """Places of the first and last value and of the extremes of each bucket."""
    count = len(values)
    if count <= points:
        return range(count)
    width = -(-count // max(1, points // 2))
    rows = -(-count // width)
    finite = np.isfinite(values)
    found = {0, count - 1, *np.flatnonzero(~finite)[:_NOT_NUMBERS].tolist()}
    starts = np.arange(rows) * width
    for filler, place in ((math.inf, np.argmin), (-math.inf, np.argmax)):
        padded = np.full(rows * width, filler)
        padded[:count] = np.where(finite, values, filler)
        found.update((starts + place(padded.reshape(rows, width), axis=1)).tolist())
    return sorted(place for place in found if place < count)


class Record:
    """One run's events.

    Attributes:
        offset: Bytes read, always the end of a line.
        others: The last events of each kind but steps.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.offset, self._inode = 0, -1
        self.curves = {name: Curve() for name in (*STEP_FIELDS, "eval_loss")}
        self.others: dict[str, deque[Event]] = {}

    def refresh(self) -> Record:
        """Read what was added; from the beginning where the file is another one."""
        with self._lock:
            try:
                with open(self.path, "rb") as lines:
                    self._follow(lines)
            except OSError:
                self._forget()
            return self

    def _follow(self, lines: Any) -> None:
        facts = os.fstat(lines.fileno())
        if facts.st_size < self.offset or facts.st_ino != self._inode:
            self._forget()
            self._inode = facts.st_ino
        lines.seek(self.offset)
        rest = b""
        while piece := lines.read(_PIECE_BYTES):
            piece = rest + piece
            end = piece.rfind(b"\n") + 1
            self._take(piece[:end].split(b"\n"))
            self.offset += end
            rest = piece[end:]

    def _take(self, lines: list[bytes]) -> None:
        steps = parsed([line for line in lines if line.startswith(_STEP)])
        held_out = parsed([line for line in lines if line.startswith(_EVAL)])
        rest = [line for line in lines if line and not line.startswith((_STEP, _EVAL))]
        for name in STEP_FIELDS:
            self.curves[name].extend(_pairs(steps, name))
        self.curves["eval_loss"].extend(_pairs(held_out, "loss"))
        for kind, events in (("step", steps), ("eval", held_out), ("", parsed(rest))):
            for event in events[-_KEPT:] if kind else events:
                kept = self.others.setdefault(str(event.get("type")), deque(maxlen=_KEPT))
                kept.append(event)

    def last(self, kind: str) -> Event:
        """The newest event of a kind, or nothing."""
        with self._lock:
            kept = self.others.get(kind)
            return kept[-1] if kept else {}

    def all(self, kind: str) -> list[Event]:
        """The newest events of a kind."""
        with self._lock:
            return list(self.others.get(kind, ()))

    def series(self, points: int) -> dict[str, Points]:
        """Every curve, thinned."""
        with self._lock:
            return {name: curve.thinned(points) for name, curve in self.curves.items()}


def _pairs(events: list[Event], name: str) -> list[tuple[int, float]]:
    try:
        pairs = [(e["step"], e[name]) for e in events if e.get(name) is not None]
        array("q", [step for step, _ in pairs]), array("d", [value for _, value in pairs])
        return pairs
    except (KeyError, TypeError):  # a line that no training wrote
        whole = [e for e in events if isinstance(e.get("step"), int)]
        return [(e["step"], e[name]) for e in whole if isinstance(e.get(name), int | float)]


def parsed(lines: list[bytes]) -> list[Event]:
    """Events of whole lines; one that a kill has cut is left out."""
    try:  # all at once takes a third of the time
        found = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        found = [_event(line) for line in lines]
    return [event for event in found if isinstance(event, dict) and "type" in event]


def _event(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Records:
    """The records of the runs that were looked at last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, Record] = OrderedDict()

    def of(self, run: Path) -> Record:
        """The record of a run, up to date."""
        with self._lock:
            record = self._kept.pop(run, None) or Record(run / EVENTS)
            self._kept[run] = record
            while len(self._kept) > _KEPT_RECORDS:
                self._kept.popitem(last=False)
        return record.refresh()
