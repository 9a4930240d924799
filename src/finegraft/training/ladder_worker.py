"""The process that trains one run of several, watched from outside.

What: ``work`` starts ``training.rung`` or a module like it, passes its events on, and returns what
it wrote; ``Clock`` says how long the whole ladder will take. How: events are read from the run's
``events.jsonl``, the only truth about progress; the process has a session of its own, and signals
are handed to it one by one. Constraint: the first Ctrl-C lets the step finish and be saved, the
second ends training at once, the third ends the process. Trade-off: events arrive up to half a
second late.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError, ModelError
from finegraft.core.paths import storage_error
from finegraft.training.events import Listener
from finegraft.training.rung import STATUS_INTERRUPTED

_LOOK_SECONDS = 0.5
RUNG = "finegraft.training.rung"


class Clock:
    """Seconds that a ladder will still take.

    Args:
        rungs: Of the ladder.
    """

    def __init__(self, rungs: int):
        self.rungs = rungs
        self.number = 1
        self.began = time.monotonic()
        self.rung_left: float | None = None
        self.took: list[float] = []

    def begin(self, number: int) -> None:
        """A rung starts."""
        self.number, self.began, self.rung_left = number, time.monotonic(), None

    def hear(self, event: dict[str, Any]) -> None:
        """Take in an event of a run."""
        if event.get("eta_seconds") is not None:
            self.rung_left = float(event["eta_seconds"])

    def end(self) -> None:
        """A rung is climbed; one that did not train says nothing about the others."""
        if self.rung_left is not None:
            self.took.append(time.monotonic() - self.began)

    def left(self) -> float | None:
        """Seconds, taking every rung to come for as long as those before; None: not known yet."""
        spent = time.monotonic() - self.began
        if self.rung_left is None and not self.took:
            return None
        mean = sum(self.took) / len(self.took) if self.took else spent + (self.rung_left or 0.0)
        now = max(mean - spent, 0.0) if self.rung_left is None else self.rung_left
        return round(now + mean * (self.rungs - self.number), 1)


def _broke_off(words: str, log: Path) -> FinegraftError:
    return ModelError(
        "FG-LADDER-008",
        f"training broke off: {words}",
        fix=f"see {log}; a smaller --per-device-train-batch-size takes less memory",
    )


def work(
    settings: Path,
    target: Path,
    how: str,
    events: Path,
    listener: Listener,
    *,
    module: str = RUNG,
    stop: Callable[[], bool] | None = None,
    broke_off: Callable[[str, Path], FinegraftError] = _broke_off,
) -> dict[str, Any]:
    """Train one run in a process of its own.

    Args:
        settings: Its configuration.
        target: Where the process writes its result; not there yet.
        how: As in ``rung.climb``.
        events: Where the run writes its events; only those to come are passed on.
        listener: Called with every event.
        module: What the process runs, see ``rung.main``.
        stop: Asked twice a second; once it says yes the run is saved and ends.
        broke_off: Makes the error of a process that ended without a result, from what is known of
            it and the place of its log.

    Returns:
        The result, ``{"stopped": True}`` where ``stop`` ended it, or ``{"error": ...}``.

    Raises:
        KeyboardInterrupt: The process was stopped.
        StorageError: FG-DISK-001 to FG-DISK-003, its log cannot be written.
    """
    log = settings.with_suffix(".log")
    words = [sys.executable, "-m", module, str(settings), str(target), how, str(os.getpid())]
    tail, stopped = _Tail(events), False
    process = _start(words, log)
    try:
        with _handing_on_signals(process, listener):
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_SECONDS)
                for event in tail.read():
                    listener(event)
                if stop and not stopped and stop() and process.poll() is None:
                    stopped = True
                    process.send_signal(signal.SIGINT)
        for event in tail.read():  # of a process that ended before it was looked at
            listener(event)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if target.is_file():
        return dict(json.loads(target.read_text(encoding="utf-8")))
    if process.returncode == STATUS_INTERRUPTED or process.returncode == -signal.SIGTERM:
        if stopped:
            return {"stopped": True}
        raise KeyboardInterrupt
    return {"error": broke_off(last_words(process.returncode, log), log).as_dict()}


def _start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the process; what it prints goes to ``log``."""
    try:
        out = open(log, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise storage_error(error, log) from error
    with out:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class _Tail:
    """Whole lines that are appended to a file after now."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = path.stat().st_size if path.is_file() else 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            text = handle.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # torn by a kill of an earlier process
                found.append(json.loads(line))
        return found


@contextlib.contextmanager
def _handing_on_signals(process: subprocess.Popen[Any], listener: Listener) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the process, which saves; after the block they end this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            process.kill()
        elif process.poll() is None:
            process.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


def last_words(status: int, log: Path) -> str:
    """What is known of a process that ended without a result."""
    lines = [s.strip() for s in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "nothing was said")
    if status < 0:
        name = signal.Signals(-status).name
        last = f"the process was ended by {name}"
        if name == "SIGKILL":
            last += ", as happens when memory ends"
    return last
