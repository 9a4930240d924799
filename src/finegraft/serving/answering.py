"""One answer in a task of its own, which ends when its client goes.

What: ``Answering`` runs an engine's iterator behind the queue and under the time limit, and hands
its items on. How: one task owns the place, the clock and the iterator; a second waits for the
client's end of the connection and cancels the first. Constraint: nobody has to read on for a place
to become free. Trade-off: what a slow client has not read yet is kept in memory, at most one
answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from finegraft.core.errors import DataError
from finegraft.serving.gate import Gate

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before its answer was whole."""


class Answering(Generic[T]):
    """Items of an answer.

    Args:
        items: Starts the answer; called when there is a place for it.
        gate: The queue.
        seconds: Longest time for waiting and answering together.
        receive: Of the ASGI connection, whose body was read already.
        on_gone: Called when the client hung up before its answer was whole.
    """

    def __init__(
        self,
        items: Callable[[], AsyncGenerator[T, None]],
        gate: Gate,
        seconds: float,
        receive: Callable[[], Awaitable[Any]],
        on_gone: Callable[[], None] = lambda: None,
    ):
        self._queue: asyncio.Queue[T | None] = asyncio.Queue()
        self._gone, self._on_gone = False, on_gone
        self._task = asyncio.create_task(self._run(items, gate, seconds))
        self._task.add_done_callback(lambda _: self._queue.put_nowait(None))
        self._watch = asyncio.create_task(self._until_gone(receive))

    async def _run(
        self, items: Callable[[], AsyncGenerator[T, None]], gate: Gate, seconds: float
    ) -> None:
        try:
            async with asyncio.timeout(seconds), gate.place(), contextlib.aclosing(items()) as each:
                async for item in each:
                    self._queue.put_nowait(item)
        except TimeoutError:
            raise DataError(
                "FG-SERVE-017",
                f"the answer was not ready after {seconds:g} s",
                allowed="the server's --timeout",
                fix="ask for fewer tokens (max_tokens), or start it with a longer --timeout",
            ) from None

    async def _until_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._task.done():
            self._gone = True
            self._on_gone()
            self._task.cancel()

    async def __aiter__(self) -> AsyncIterator[T]:
        """Items as they come.

        Raises:
            ClientGone: There is nobody to give them to.
            DataError: FG-SERVE-010 the queue is full, FG-SERVE-017 too late; and the engine's.
        """
        while (item := await self._queue.get()) is not None:
            yield item
        if self._gone:
            raise ClientGone
        self._task.result()

    async def close(self) -> None:
        """End both tasks, whatever they are at."""
        for task in (self._watch, self._task):
            task.cancel()
        await asyncio.gather(self._watch, self._task, return_exceptions=True)
