"""One tail for each run that somebody watches, shared by all who watch it.

What: ``Feeds.listen`` yields ready events from a place in the file on. How: a task for each run
reads what was added, makes one piece of bytes of it, and puts the same piece into every listener's
queue. Constraint: at most four batches a second, fewer where many listen, so that watching costs a
training next to nothing. Trade-off: a listener that reads too slowly is dropped; browsers connect
again from where they were.

Units: seconds; places are bytes of ``events.jsonl``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from finegraft.training.report import read
from finegraft.ui import replies
from finegraft.ui.record import EVENTS, parsed

PERIOD_SECONDS = 0.25
LISTENER_SECONDS = 0.01  # of period for each listener: 200 get a batch every two seconds
_STATE_SECONDS = 2.0
_BEAT_SECONDS = 15.0
_PIECE_BYTES = 1 << 18
_MOST_WAITING = 64  # batches
_TURNS = {"run", "start", "end", "interrupted", "stopped", "failed"}

# What is sent, and where its events begin and end; None ends the listener.
Queue = asyncio.Queue[tuple[bytes, int, int] | None]


class Feed:
    """The tail of one run."""

    def __init__(self, run: Path):
        self.run, self.path = run, run / EVENTS
        self.queues: set[Queue] = set()
        self.place, self.state = 0, ""
        self._looked = self._told = 0.0
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def listen(self, start: int) -> AsyncGenerator[bytes, None]:
        """Yield events from a place on, until the server ends or the listener is too slow."""
        queue: Queue = asyncio.Queue()
        if not self.queues:
            self.place = _end_of_lines(self.path)
        seen = self.place  # what comes later is put into the queue
        self.queues.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._follow())
        try:
            await self._look_again()
            yield replies.event("state", {"state": self.state})
            if start > _size(self.path):  # the reader knows an older file
                start = 0
                yield replies.event("reset", {})
            while start < seen:
                part, place = batch(self.path, start, seen)
                if place == start:
                    break
                start = place
                if part:
                    yield part
            while (item := await queue.get()) is not None:
                part, begin, end = item
                if begin < start < end:  # the reader has seen the first of these
                    part = batch(self.path, start, end)[0]
                if part and not begin < end <= start:
                    yield part
                start = 0 if end < 0 else start
        finally:
            self.queues.discard(queue)

    def close(self) -> None:
        """End every listener."""
        for queue in self.queues:
            queue.put_nowait(None)

    async def _follow(self) -> None:
        while self.queues:
            await asyncio.sleep(max(PERIOD_SECONDS, LISTENER_SECONDS * len(self.queues)))
            self._advance()
            await self._look_again()
            if time.monotonic() - self._told > _BEAT_SECONDS:
                self._send(replies.BEAT)
        self._task = None

    async def _look_again(self) -> None:
        """Find out what has become of the run, unless that was done a moment ago."""
        async with self._looking:
            if time.monotonic() - self._looked > _STATE_SECONDS:
                self._looked = time.monotonic()
                before, self.state = self.state, await asyncio.to_thread(state_of, self.run)
                if before not in ("", self.state):
                    self._send(replies.event("state", {"state": self.state}))

    def _advance(self) -> None:
        """Send what was added since the last time; a new file from its beginning."""
        size = _size(self.path)
        if size < self.place:
            self.place = 0
            self._send(replies.event("reset", {}), -1, -1)
        while self.place < size:
            part, place = batch(self.path, self.place, size)
            if place == self.place:
                return
            begin, self.place = self.place, place
            if part:
                self._send(part, begin, place)
                if any(b'"type":"%s"' % kind.encode() in part for kind in _TURNS):
                    self._looked = 0.0

    def _send(self, part: bytes, begin: int = 0, end: int = 0) -> None:
        self._told = time.monotonic()
        for queue in list(self.queues):
            if queue.qsize() >= _MOST_WAITING:
                self.queues.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait((part, begin, end))


def state_of(run: Path) -> str:
    """What has become of a run, see ``training.report.read``; ``gone`` where it is not there."""
    return read.summary(run).state if run.is_dir() else "gone"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _end_of_lines(path: Path) -> int:
    """Where the last whole line ends."""
    size = _size(path)
    start = max(0, size - _PIECE_BYTES)
    try:
        with open(path, "rb") as lines:
            lines.seek(start)
            return start + lines.read(size - start).rfind(b"\n") + 1
    except OSError:
        return 0


def batch(path: Path, start: int, end: int) -> tuple[bytes, int]:
    """One event of the whole lines behind ``start``, and the place after them."""
    try:
        with open(path, "rb") as lines:
            lines.seek(start)
            data = lines.read(min(end - start, _PIECE_BYTES))
            while data and b"\n" not in data and start + len(data) < end:  # one long line
                data += lines.read(_PIECE_BYTES)
    except OSError:
        return b"", start
    whole = data.rfind(b"\n") + 1
    if not whole:
        return b"", start
    place = start + whole
    events = parsed([line for line in data[:whole].split(b"\n") if line])
    return (replies.event("events", events, place) if events else b""), place


class Feeds:
    """The tails of all runs that are watched."""

    def __init__(self) -> None:
        self._feeds: dict[Path, Feed] = {}
        self.closed = asyncio.Event()

    async def listen(self, run: Path, start: int) -> AsyncGenerator[bytes, None]:
        """Yield the events of a run from a place on."""
        if self.closed.is_set():
            return
        feed = self._feeds.setdefault(run, Feed(run))
        try:
            async with contextlib.aclosing(feed.listen(start)) as parts:
                async for part in parts:
                    yield part
        finally:
            if not feed.queues:
                self._feeds.pop(run, None)

    def close(self) -> None:
        """End all of them, and let no other begin."""
        self.closed.set()
        for feed in self._feeds.values():
            feed.close()
