"""Server-sent events as a response that ends with its reader or with the server.

What: ``Events`` sends what an asynchronous iterator gives. How: a plain ASGI response, because 200
listeners of one run pass here for every batch. Constraint: an iterator is closed however the stream
ends. Trade-off: a task more for each reader, which waits for it to hang up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response


class Events(Response):
    """A stream of ready events.

    Args:
        parts: Bytes as ``replies.event`` makes them.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[bytes, None]):
        super().__init__()
        del self.headers["content-length"]
        self.parts = parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send events as they come."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Any) -> None:
        async with contextlib.aclosing(self.parts):
            async for part in self.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
