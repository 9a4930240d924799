"""A bounded queue before the engine.

What: ``Gate.place()`` lets ``slots`` requests in at a time, keeps ``waiting`` more in order, and
refuses the rest. Constraint: who leaves early (a client that hung up) leaves at once, in the queue
or inside. Trade-off: ``Retry-After`` is a guess from how long the last answers took.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

from finegraft.core.errors import DataError


class Gate:
    """Places for requests.

    Args:
        slots: Requests inside at a time.
        waiting: Requests in the queue; one more is refused.
    """

    def __init__(self, slots: int, waiting: int):
        self.slots, self.most_waiting = slots, waiting
        self.waiting = self.inside = 0
        self._free = asyncio.Semaphore(slots)
        self._seconds = 1.0  # of an answer, averaged

    @property
    def retry_after(self) -> int:
        """Seconds until the queue has probably moved."""
        return min(60, max(1, math.ceil(self._seconds * (self.waiting + 1) / self.slots)))

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it for a block.

        Raises:
            DataError: FG-SERVE-010, the queue is full.
        """
        if self._free.locked() and self.waiting >= self.most_waiting:
            raise DataError(
                "FG-SERVE-010",
                f"{self.inside} requests are being answered and {self.waiting} are waiting",
                allowed=f"{self.slots} at a time and {self.most_waiting} in the queue",
                fix=f"try again in {self.retry_after} s; the server's --slots and --queue set this",
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.inside += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
            self.inside -= 1
            self._free.release()
