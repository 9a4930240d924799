"""Command lines as processes that outlive this server.

What: ``start`` runs words of ``finegraft`` in a session of their own, ``Process`` finds one again
by number and start time. How: a shell of four words waits for the command and writes its exit
status, because a status goes to the parent alone and the parent may be gone. Constraint: a number
that the system has given to another program is never signalled. Trade-off: a shell of a megabyte
for each command that runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

STDOUT, STDERR, STATUS = "stdout", "stderr", "status"
_SAME_SECONDS = 2.0  # between two readings of one start time
# The signals end the command and not the shell, which still has to write the status.
_SHELL = 'trap : INT TERM HUP; out="$1"; shift; "$@"; echo $? > "$out.part"; mv "$out.part" "$out"'


@dataclass(frozen=True)
class Process:
    """A process that may have ended."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has a number now."""
        return cls(pid, psutil.Process(pid).create_time())

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < _SAME_SECONDS
            return same and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def signal(self, number: int = signal.SIGINT, *, group: bool = False) -> bool:
        """Send a signal, to its whole session with ``group``; False where it has ended."""
        if not self.alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)
        return True


def start(
    words: Sequence[str], folder: Path, space: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``finegraft WORDS --json`` with its output in files of ``folder``.

    Args:
        words: Of the command line.
        folder: Exists; gets ``stdout``, ``stderr`` and, at the end, ``status``.
        space: Where it works.
        env: Added to the environment.
    """
    command = [sys.executable, "-m", "finegraft.cli.main", *words, "--json"]
    shell = ["/bin/sh", "-c", _SHELL, "sh", str(folder / STATUS), *command]
    own = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "100", **(env or {})}
    with open(folder / STDOUT, "wb") as out, open(folder / STDERR, "wb") as err:
        return subprocess.Popen(
            shell,
            cwd=space,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def status(folder: Path) -> int | None:
    """The exit status of a command, as a shell says it; None before its end."""
    try:
        return int((folder / STATUS).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
