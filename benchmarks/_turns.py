"""Worker processes that take turns.

What: a ``Contender`` starts a worker script and talks with it in lines, JSON on the way back.
Constraint: a worker that waits uses no processor time, so only one works at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Contender:
    """A worker process; ``worker`` is the script that it runs."""

    def __init__(self, name: str, job: Path, log: Path, worker: str = "_worker.py"):
        self.name = name
        self.seconds: list[float] = []
        self.memory = 0
        self.heldout_loss: float | None = None
        self.log = open(log, "w")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / worker), name, str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{Path(self.log.name).read_text()}")
        return json.loads(line)

    def ask(self, line: str) -> dict[str, Any]:
        """Let the worker do one thing; return what it says about it."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def go(self) -> dict[str, Any]:
        event = self.ask("go")
        if event["event"] == "step":
            self.seconds.append(event["seconds"])
            self.memory = max(self.memory, event["memory"])
        return event
