"""What every request passes before anything reads it: host, key, type and size.

What: an ASGI layer around the application. How: headers are looked at first; a body is counted as
it arrives and cut off where it grows too large. Constraint: a key is compared in constant time and
written nowhere; without a key only requests that name this machine as their host are taken, so that
a web page cannot reach the server through a name that it controls, and a body must be declared as
JSON, which browsers do not let foreign pages do. Trade-off: a proxy in front needs a key.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from finegraft.core.errors import DataError
from finegraft.serving import replies

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_BODY_SECONDS = 30.0  # for each part of a body to arrive
_OPEN = ("/", "/health")  # answered without a key
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Checks in front of an ASGI application.

    Args:
        key: What clients must send as ``Authorization: Bearer KEY``; None: nothing.
        most_bytes: Of a body.
        host: The address that the server is bound to.
    """

    def __init__(self, app: Any, key: str | None, most_bytes: int, host: str):
        self.app, self.most_bytes = app, most_bytes
        self._key = None if key is None else key.encode()
        self._hosts = {*_LOCAL, host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.lower(): value for key, value in scope["headers"]}
        refused = self._problem(scope, headers)
        if refused is not None:
            await replies.error(refused)(scope, receive, send)
            return
        read, whole = 0, False

        async def counted() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout(None if whole else _BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise _too_slow() from None
            whole = whole or not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.most_bytes:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> DataError | None:
        """Why a request is refused by its headers alone, or None."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._key is None and name not in self._hosts:
            return DataError(
                "FG-SERVE-011",
                "the Host header does not name this server",
                allowed=", ".join(sorted(self._hosts)),
                fix="use the address that the server printed, or start it with --api-key",
            )
        if self._key is not None and scope["path"] not in _OPEN and not self._knows(headers):
            return DataError(
                "FG-SERVE-012",
                "the API key is missing or wrong",
                allowed="the header 'Authorization: Bearer KEY'",
                fix="OpenAI(api_key=KEY, base_url=...) with the key that the server has",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > self.most_bytes:
            return self._too_large()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            return DataError(
                "FG-SERVE-014",
                "the body is not declared as JSON",
                allowed="the header 'Content-Type: application/json'",
                fix="send that header",
            )
        return None

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        assert self._key is not None
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key)

    def _too_large(self) -> DataError:
        return DataError(
            "FG-SERVE-013",
            f"the body is larger than {self.most_bytes} bytes",
            allowed=f"up to {self.most_bytes} bytes",
            fix="send less, or start the server with a larger --max-body",
        )


def _too_slow() -> DataError:
    return DataError(
        "FG-SERVE-017",
        f"no part of the body came for {_BODY_SECONDS:g} s",
        fix="send the whole body at once",
    )
