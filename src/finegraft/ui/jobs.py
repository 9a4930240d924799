"""Everything that takes time: a command line for each, found again by the next server.

What: ``Jobs`` starts commands, lists them, tells what they said and stops them. How: a folder for
each, with ``job.json`` and the files of ``processes``; nothing else is kept. Constraint: what a job
is now is read from those files and from the system, so it is true after any restart. Trade-off:
folders stay until the newest ``KEPT`` push them out.

Units: seconds since 1970.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError
from finegraft.core.paths import write_whole
from finegraft.ui import processes, replies
from finegraft.ui.commands import Command
from finegraft.ui.processes import Process
from finegraft.ui.workspace import Workspace

KEPT = 200
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
_SHOWN_LETTERS = 8000
_READ_BYTES = 1 << 16
_MOST_RESULT_BYTES = 16 << 20
_INTERRUPTED = 130
_PERIOD_SECONDS = 0.25
_BEAT_SECONDS = 15.0
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\r(?!\n)|\x08")
# A check that says "do not train" has done what it was asked for.
_GOOD = {"check": (0, 1), "fix": (0, 1)}


@dataclass(frozen=True)
class Job:
    """One command line that was started; the fields are those of ``Command``."""

    id: str
    kind: str
    folder: Path
    process: Process
    command: str
    began: float
    run: str | None
    report: str | None
    makes_run: bool

    @property
    def state(self) -> str:
        """running, done, failed or stopped."""
        status = processes.status(self.folder)
        if status is None:
            if self.process.alive:
                return RUNNING
            status = processes.status(self.folder)  # it may have ended in between
        if status in _GOOD.get(self.kind, (0,)):
            return DONE
        return STOPPED if status == _INTERRUPTED else FAILED

    @property
    def seconds(self) -> float:
        """From its start to its end, or until now."""
        end = time.time()
        with contextlib.suppress(OSError):
            end = (self.folder / processes.STATUS).stat().st_mtime
        return round(max(0.0, end - self.began), 2)

    def brief(self) -> dict[str, Any]:
        """For a list."""
        return {
            "id": self.id,
            "kind": self.kind,
            "command": self.command,
            "state": self.state,
            "began": self.began,
            "seconds": self.seconds,
            "run": self.run,
        }

    def whole(self) -> dict[str, Any]:
        """With what it said."""
        values = self.brief()
        ended = values["state"] != RUNNING
        result = self.result() if ended else None
        return {
            **values,
            "exit_status": processes.status(self.folder) if ended else None,
            "output": self.output()[-_SHOWN_LETTERS:],
            "result": result,
            "error": self._error(result) if values["state"] == FAILED else None,
            "page": f"/jobs/{self.id}/page/" if self.report and ended else None,
        }

    def _error(self, result: Any) -> dict[str, Any]:
        """Why it failed: what it said as JSON, else its last words."""
        told = result.get("error") if isinstance(result, dict) else None
        told = told if isinstance(told, dict) else {}
        words = self.output().strip().rpartition("\n")[2]
        return {
            "code": told.get("code"),
            "message": told.get("found") or words or "its process ended without a word",
            "allowed": told.get("allowed"),
            "fix": told.get("fix"),
        }

    def output(self) -> str:
        """The end of what it wrote for people."""
        try:
            with open(self.folder / processes.STDERR, "rb") as said:
                size = said.seek(0, 2)
                said.seek(max(0, size - _READ_BYTES))
                return words_of(said.read())
        except OSError:
            return ""

    def result(self) -> Any:
        """The one JSON object that it printed, or None."""
        try:
            with open(self.folder / processes.STDOUT, "rb") as said:
                return json.loads(said.read(_MOST_RESULT_BYTES))
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        """Ask it to end as Ctrl-C does.

        Raises:
            ConfigError: FG-UI-013, it has ended.
        """
        if self.state != RUNNING or not self.process.signal(group=True):
            raise ConfigError(
                "FG-UI-013",
                f"job {self.id} has ended ({self.state})",
                allowed="a job that is running",
                fix="nothing is left to stop; start it again if it is wanted",
            )

    async def follow(self, closed: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """Yield what it says as it says it, then the whole job."""
        place, told = 0, time.monotonic()
        while not closed.is_set():
            ended = self.state != RUNNING  # before reading, so that the last words are not lost
            text, place = self._said(place)
            if text:
                yield replies.event("output", {"text": text})
                told = time.monotonic()
            elif ended:
                yield replies.event("end", {"job": self.whole()})
                return
            elif time.monotonic() - told > _BEAT_SECONDS:
                yield replies.BEAT
                told = time.monotonic()
            if not ended:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(closed.wait(), _PERIOD_SECONDS)

    def _said(self, place: int) -> tuple[str, int]:
        """What was written since a place, up to a line's end while more may come."""
        try:
            with open(self.folder / processes.STDERR, "rb") as said:
                said.seek(place)
                data = said.read(_READ_BYTES)
        except OSError:
            return "", place
        end = data.rfind(b"\n") + 1
        data = data[:end] if end else data
        return words_of(data), place + len(data)


def words_of(data: bytes) -> str:
    """Output without what steers a terminal."""
    return _ANSI.sub("", data.decode("utf-8", "replace"))


class Jobs:
    """All jobs of a workspace.

    Args:
        space: Whose they are.
    """

    def __init__(self, space: Workspace):
        self.space = space
        self.folder = space.own / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, kind: str, command: Command) -> Job:
        """Start a command."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = self.folder / name
        folder.mkdir()
        began = time.time()
        child = processes.start(command.words, folder, self.space.root)
        self._children = [one for one in self._children if one.poll() is None] + [child]
        process = Process.of(child.pid)
        values = {
            "id": name,
            "kind": kind,
            "words": list(command.words),
            "command": command.shown,
            "began": began,
            "run": command.run,
            "report": command.report,
            "makes_run": command.makes_run,
            "process": {"pid": process.pid, "started": process.started},
        }
        write_whole(folder / "job.json", json.dumps(values, indent=1) + "\n")
        self._forget_old()
        return self.get(name)

    def _forget_old(self) -> None:
        for folder in sorted(self.folder.iterdir())[:-KEPT]:
            job = self._read(folder)
            if job is None or job.state != RUNNING:
                shutil.rmtree(folder, ignore_errors=True)

    def get(self, name: str) -> Job:
        """A job by its id.

        Raises:
            ConfigError: FG-UI-011, there is none.
        """
        job = self._read(self.folder / name) if _ID.fullmatch(name) else None
        if job is None:
            raise ConfigError(
                "FG-UI-011",
                f"no job '{name[:40]}'",
                allowed=f"the newest {KEPT} jobs of this workspace",
                fix="look at the list of jobs again",
            )
        return job

    def all(self, kind: str | None = None) -> list[Job]:
        """Every job, or those of a kind, the newest first."""
        folders = sorted(self.folder.iterdir(), reverse=True)
        found = [job for folder in folders if (job := self._read(folder)) is not None]
        return [job for job in found if kind in (None, "", job.kind)]

    def at_work_on(self, run: str) -> Job | None:
        """The job that is making a run now."""
        for job in self.all():
            if job.makes_run and job.run == run and job.state == RUNNING:
                return job
        return None

    def _read(self, folder: Path) -> Job | None:
        self._children = [one for one in self._children if one.poll() is None]
        try:
            values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            return Job(
                id=values["id"],
                kind=values["kind"],
                folder=folder,
                process=Process(**values["process"]),
                command=values["command"],
                began=values["began"],
                run=values["run"],
                report=values["report"],
                makes_run=values["makes_run"],
            )
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or not ours
            return None
