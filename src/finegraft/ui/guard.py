"""What every request passes before anything reads it: host, origin, cookie, size.

What: an ASGI layer around the application. How: headers first, the body counted as it comes; the
answer gets the headers that keep a browser strict. Constraint: the server runs commands, so a page
of another origin must reach nothing: not by a name that it controls (Host), not by a form or script
(Origin, Sec-Fetch-Site), not without the cookie, which a browser sends from this page only.
Trade-off: the page works under ``127.0.0.1`` and ``localhost`` alone, and not behind a proxy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from finegraft.core.errors import ConfigError, DataError, FinegraftError
from finegraft.ui import replies
from finegraft.ui.sessions import Sessions

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# A report is one file with its own style and no script; the sandbox keeps it that way.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; sandbox"
)
MOST_JSON_BYTES = 4 << 20
MOST_UPLOAD_BYTES = 2 << 30
_BODY_SECONDS = 60.0  # for each part of a body to arrive
_UPLOADS = "/api/data/"
_SAFE = ("GET", "HEAD")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)


class Guard:
    """Checks in front of an ASGI application.

    Args:
        sessions: Whose cookies are let in.
        port: That the server listens on.
        most_upload: Bytes of an uploaded file.
    """

    def __init__(self, app: Any, sessions: Sessions, port: int, most_upload: int):
        self.app, self.sessions, self.most_upload = app, sessions, most_upload
        self.cookie = cookie_name(port)
        self.hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request or pass it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _strict(send, scope["path"])
        refused = self._problem(scope)
        if refused is not None:
            await replies.error(refused)(scope, receive, send)
            return
        await self.app(scope, self._counted(scope, receive), send)

    def _problem(self, scope: Scope) -> FinegraftError | None:
        """Why a request is refused by its headers alone, or None."""
        headers: dict[bytes, list[bytes]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return ConfigError(
                "FG-UI-002",
                "the Host header does not name this server",
                allowed=", ".join(sorted(host.decode() for host in self.hosts)),
                fix="open the address that `finegraft ui` printed",
            )
        if not self._own_page(scope, headers, hosts[0].lower()):
            return ConfigError(
                "FG-UI-003",
                "the request comes from a page of another address",
                allowed="requests of the page that this server gives",
                fix="open the address that `finegraft ui` printed",
            )
        if not _open(scope) and not self._known(headers):
            return ConfigError(
                "FG-UI-001",
                "this browser is not signed in to this server",
                allowed="the browser that opened the printed address",
                fix="press Enter where `finegraft ui` runs, and open the address that it prints",
            )
        length = headers.get(b"content-length", [b"0"])[0]
        if length.isdigit() and (len(length) > 15 or int(length) > self._most(scope)):
            return self._too_large(scope)
        return None

    def _own_page(self, scope: Scope, headers: dict[bytes, list[bytes]], host: bytes) -> bool:
        """Whether a request is of this server's page, or of no page at all."""
        if any(origin.lower() != b"http://" + host for origin in headers.get(b"origin", [])):
            return False
        sites = set(headers.get(b"sec-fetch-site", []))
        if sites <= {b"same-origin", b"none"}:
            return True
        # a link on another page may lead here; what it gets has no secret in it
        opened = headers.get(b"sec-fetch-mode") == [b"navigate"]
        return opened and scope["method"] in _SAFE and scope["path"] == "/"

    def _known(self, headers: dict[bytes, list[bytes]]) -> bool:
        for line in headers.get(b"cookie", []):
            for pair in line.decode("latin-1").split(";"):  # others' may be of any shape
                name, _, value = pair.strip().partition("=")
                if name == self.cookie and self.sessions.knows(value):
                    return True
        return False

    def _most(self, scope: Scope) -> int:
        upload = scope["method"] == "PUT" and scope["path"].startswith(_UPLOADS)
        return self.most_upload if upload else MOST_JSON_BYTES

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that stops a body that grows too large or stops coming."""
        read, whole, most = 0, False, self._most(scope)

        async def counted() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout(None if whole else _BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise _too_slow() from None
            whole = whole or not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > most:
                raise self._too_large(scope)
            return message

        return counted

    def _too_large(self, scope: Scope) -> DataError:
        most = self._most(scope)
        return DataError(
            "FG-UI-006",
            f"what was sent is larger than {most:,} bytes",
            allowed=f"up to {most:,} bytes",
            fix="copy a larger file into the folder data/ of the workspace instead",
        )


def cookie_name(port: int) -> str:
    """The cookie of the server at a port; browsers do not tell ports apart by themselves."""
    return f"finegraft_ui_{port}"


def _open(scope: Scope) -> bool:
    """What is answered without a cookie: the page itself, and signing in."""
    path, method = scope["path"], scope["method"]
    if method in _SAFE:
        return path in ("/", "/favicon.ico") or path.startswith("/static/")
    return bool(method == "POST" and path == "/api/session")


def _strict(send: Send, path: str) -> Send:
    """``send`` that adds the headers which keep a browser strict."""

    async def added(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            names = {key.lower() for key, _ in headers}
            headers += _HEADERS
            if b"content-security-policy" not in names:
                headers.append((b"content-security-policy", POLICY.encode()))
            if b"cache-control" not in names:
                stored = b"no-cache" if path.startswith("/static/") else b"no-store"
                headers.append((b"cache-control", stored))
            message = {**message, "headers": headers}
        await send(message)

    return added


def _too_slow() -> DataError:
    return DataError(
        "FG-UI-023",
        f"no part of what was sent came for {_BODY_SECONDS:g} s",
        fix="send it again; nothing of it was kept",
    )
