"""Run the page's server until it is told to stop.

What: ``serve`` binds, answers, prints addresses through its callers, and ends on SIGTERM or Ctrl-C.
How: uvicorn with its own signal handling replaced; streams are ended first, so that nothing waits
for a reader. Constraint: it listens on this machine alone. Trade-off: the process works in the
workspace from then on, so that paths mean here what they mean in a terminal there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError
from finegraft.serving import run as serving

HOST = "127.0.0.1"
USUAL_PORT = 8760
_GRACE_SECONDS = 3


def require_extra() -> None:
    """Prove that the packages are there.

    Raises:
        ConfigError: FG-UI-008, with the command that installs them.
    """
    packages = ("fastapi", "uvicorn")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "FG-UI-008",
            f"the page needs {', '.join(missing)}, which is not installed",
            allowed="the packages of the extra 'ui'",
            fix="pip install 'finegraft[ui]'",
        )


def listener(port: int | None) -> socket.socket:
    """A listening socket; without a port the usual one, or any where that is taken.

    Raises:
        ConfigError: FG-SERVE-004, the port that was asked for is taken.
    """
    if port is not None:
        return serving.bind(HOST, port)
    try:
        return serving.bind(HOST, USUAL_PORT)
    except ConfigError:
        return serving.bind(HOST, 0)


def serve(
    root: Path,
    port: int | None = None,
    *,
    ready: Callable[[str], None],
    again: Callable[[str], None],
    stopping: Callable[[], None],
) -> None:
    """Serve the page until SIGTERM or Ctrl-C. Commands that it started go on.

    Args:
        root: The workspace.
        port: 0 takes any free one; None the usual one, if it is free.
        ready: Called with the first address once the server answers.
        again: Called with a new address for each Enter.
        stopping: Called when it was told to stop.

    Raises:
        ConfigError: FG-UI-008, FG-SERVE-004.
        StorageError: FG-DISK-001 to FG-DISK-003, the workspace cannot be written.
    """
    require_extra()
    from finegraft.ui.workspace import Workspace

    space = Workspace(root)
    with contextlib.closing(listener(port)) as bound:
        os.chdir(space.root)
        asyncio.run(_serve(space, bound, ready, again, stopping))


async def _serve(
    space: Any,
    bound: socket.socket,
    ready: Callable[[str], None],
    again: Callable[[str], None],
    stopping: Callable[[], None],
) -> None:
    import uvicorn

    from finegraft.ui.app import build
    from finegraft.ui.desk import Desk

    desk = Desk.of(space, bound.getsockname()[1])

    class Server(uvicorn.Server):
        """Leaves signals to ``_stopping``, and says when it listens."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(desk.address())

    config = uvicorn.Config(
        build(desk),
        log_config=None,
        log_level="warning",
        access_log=False,  # addresses hold names of runs and files
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = Server(config)
    try:
        with _stopping(server, desk, stopping), _new_addresses(desk, again):
            await server.serve(sockets=[bound])
    finally:
        await desk.close()


@contextlib.contextmanager
def _stopping(server: Any, desk: Any, stopping: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the streams, then the server; the second time at once."""
    loop = asyncio.get_running_loop()
    errors = logging.getLogger("uvicorn.error")
    was_off = errors.disabled

    def end() -> None:
        errors.disabled = True  # it reports what is cut off as failures
        desk.feeds.close()

    def stop(*_: Any) -> None:
        first = not server.should_exit
        server.force_exit, server.should_exit = not first, True
        loop.call_soon_threadsafe(end)
        if first:
            loop.call_soon_threadsafe(stopping)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        errors.disabled = was_off
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _new_addresses(desk: Any, again: Callable[[str], None]) -> Iterator[None]:
    """In a terminal, every Enter gives another address."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        if sys.stdin.readline():
            again(desk.address())
        else:  # Ctrl-D
            loop.remove_reader(sys.stdin)

    loop.add_reader(sys.stdin, pressed)
    try:
        yield
    finally:
        loop.remove_reader(sys.stdin)
