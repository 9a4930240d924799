"""The thread that moves lanes on, and how what it says gets out of it.

What: ``Worker.run`` takes requests from ``inbox`` and advances every busy lane in turn; ``Post``
carries pieces to the event loop. Constraint: a lane that fails refuses what was being answered and
goes on with the next request. Trade-off: pieces wait for the end of a token, so that the loop wakes
once for all rows: on two cores every waking takes a core away from a step that spins on both.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable
from typing import Any

from finegraft.serving.engines._contract import Piece

log = logging.getLogger(__name__)

FAILED = "failed"  # reason of the piece that ends an answer which broke
_FAILURES = (RuntimeError, MemoryError, ValueError, IndexError, TypeError)


class Worker:
    """Moves lanes on, in the thread that ``run`` is called in."""

    def __init__(self, lanes: list[Any], flush: Callable[[], None]):
        self.lanes, self.flush = lanes, flush
        self.inbox: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self.rows: list[Any] = []

    def run(self) -> None:
        """Move every lane on until None comes."""
        while True:
            busy = any(lane.busy for lane in self.lanes)
            while not busy or not self.inbox.empty():
                item = self.inbox.get()
                if item is None:
                    return
                lane, row = item
                lane.add(row)
                self.rows = [r for r in self.rows if not r.done and not r.cancelled] + [row]
                busy = True
            for lane in self.lanes:
                if lane.busy:
                    self._advance(lane)

    def _advance(self, lane: Any) -> None:
        try:
            lane.advance()
        except _FAILURES:
            log.exception("an answer failed; the requests that were being answered are refused")
            for row in self.rows:
                if not row.done:
                    row.cancelled = True
                    row.give(Piece(reason=FAILED))
        finally:
            self.flush()


class Post:
    """Carries pieces from the thread of the lanes to those who asked, many at a time."""

    def __init__(self) -> None:
        self._sent: list[tuple[asyncio.Queue[Piece], Piece]] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    def put(self, to: asyncio.Queue[Piece], piece: Piece) -> None:
        """Keep a piece for the next ``flush``."""
        self._sent.append((to, piece))

    def flush(self) -> None:
        """Hand over what was put."""
        sent, self._sent = self._sent, []
        if sent and self.loop is not None:
            self.loop.call_soon_threadsafe(_deliver, sent)


def _deliver(sent: list[tuple[asyncio.Queue[Piece], Piece]]) -> None:
    for to, piece in sent:
        to.put_nowait(piece)
