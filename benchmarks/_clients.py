"""Streaming clients of an OpenAI-compatible server, light enough to share its machine.

What: ``load`` keeps so many streams open against a server for so many seconds and counts. How: one
event loop, plain sockets, no JSON parsed but where a stream ends; a token is an event with text in
it. Constraint: every way in which a stream can go wrong is counted apart, and one that says nothing
for ``PATIENCE`` seconds after its first token is stuck. Trade-off: streams that are open when the
time is up are hung up on, which tells whether the server lets go of them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds
COMMAND = [str(Path(sys.executable).with_name("finegraft")), "serve"]
WORDS = [
    "river",
    "stone",
    "lantern",
    "harbour",
    "winter",
    "music",
    "garden",
    "engine",
    "paper",
    "thunder",
]


def question(number: int) -> list[dict[str, str]]:
    """A question of its own for every request, of 3 to 20 words."""
    count = 3 + number * 7 % 18
    words = " ".join(WORDS[(number * 3 + i * i) % len(WORDS)] for i in range(count))
    return [{"role": "user", "content": f"Tell story number {number} with these words: {words}"}]


@dataclass
class Counts:
    """What happened in one stretch of load.

    Attributes:
        seen: ``whole``, ``busy`` (429), ``cut`` (open when the time was up), and every failure.
        first: Seconds from a request to its first token.
    """

    seconds: float = 0.0
    tokens: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, of all streams together."""
        return self.tokens / self.seconds

    @property
    def failures(self) -> dict[str, int]:
        """Everything that should not have happened."""
        return {k: n for k, n in self.seen.items() if k not in ("whole", "busy", "cut")}


class Server:
    """A process that serves.

    Args:
        command: Prints one JSON object with its ``url`` when it answers.
        log: Where its standard error goes.
    """

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.log = open(log, "w")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **environment},
        )
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"no server: {line}{log.read_text()}")
        self.url = json.loads(line)["url"]

    @property
    def memory(self) -> int:
        """Resident bytes."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        import psutil

        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def running(self) -> int:
        """Requests inside, as finegraft's ``/health`` has it."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            return json.load(answer)["running"]

    def freed(self, patience: float = 10.0) -> float:
        """Seconds until nothing is answered any more."""
        began = time.monotonic()
        while self.running():
            if time.monotonic() - began > patience:
                return patience
            time.sleep(0.02)
        return time.monotonic() - began

    def settle(self, patience: float = 60.0) -> float:
        """Wait until it uses no processor time; return seconds. The next one's turn begins then."""
        began = time.monotonic()
        while time.monotonic() - began < patience:
            used = self.seconds
            time.sleep(0.25)
            if self.seconds - used < 0.03:
                break
        return time.monotonic() - began

    def stop(self) -> int:
        """End it; return its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.log.close()
        return self.process.wait()


async def stream(url: str, body: dict[str, Any], counts: Counts) -> str:
    """One request; return what became of it."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps({"stream": True, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    began, spoke, rest, ended = time.monotonic(), False, b"", False
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return "no connection"
    try:
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split()[1])
        if status != 200:
            await reader.read()
            return "busy" if status == 429 else f"status {status}"
        while True:
            async with asyncio.timeout(PATIENCE if spoke else None):
                part = await reader.read(1 << 16)
            if not part:
                return "whole" if ended else "broke off"
            rest += part
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if line.startswith(b'data: {"error"'):
                    return "error event"
                ended = ended or line.startswith(b"data: [DONE]")
                if b'"content":"' in line and b'"content":""' not in line:
                    counts.tokens += 1
                    if not spoke:
                        spoke = True
                        counts.first.append(time.monotonic() - began)
    except TimeoutError:
        return "stuck"
    except (OSError, IndexError, ValueError) as error:
        return type(error).__name__
    finally:
        writer.close()


async def _load(
    url: str, clients: int, seconds: float, body: dict[str, Any], numbers: itertools.count
) -> Counts:
    counts = Counts()

    async def work() -> None:
        while True:
            asked = {"messages": question(next(numbers)), **body}
            try:
                outcome = await stream(url, asked, counts)
            except asyncio.CancelledError:
                counts.seen["cut"] += 1
                raise
            counts.seen[outcome] += 1
            if outcome != "whole":
                await asyncio.sleep(0.5)

    began = time.monotonic()
    tasks = [asyncio.create_task(work()) for _ in range(clients)]
    await asyncio.sleep(seconds)
    counts.seconds = time.monotonic() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return counts


def load(url: str, clients: int, seconds: float, numbers: itertools.count, **body: Any) -> Counts:
    """Keep ``clients`` streams open for ``seconds``; ``body`` is added to every request."""
    return asyncio.run(_load(url, clients, seconds, body, numbers))
