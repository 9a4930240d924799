"""Run the server until it is told to stop.

What: ``serve`` binds, loads the engine, answers, and on SIGTERM or Ctrl-C finishes what is open.
How: uvicorn with its own signal handling replaced by one that ends well (uvicorn raises the signal
again, so that the status would not be 0). Constraint: an address that others can reach needs a key.
Trade-off: the port is taken before the model is loaded, so clients that come early wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import ConfigError
from finegraft.serving import engines

if TYPE_CHECKING:
    from finegraft.serving.app import Limits

_EXTRA = "pip install 'finegraft[serve]'"


def require_extra(*packages: str) -> None:
    """Prove that optional packages are there.

    Raises:
        ConfigError: FG-SERVE-002, with the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "FG-SERVE-002",
            f"serving needs {', '.join(missing)}, which is not installed",
            allowed="the packages of the extra 'serve'",
            fix=_EXTRA,
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(host: str, key: str | None) -> None:
    """Prove that the server may listen there.

    Raises:
        ConfigError: FG-SERVE-001, an address that others can reach and no key, or a weak one.
    """
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable()):
        raise ConfigError(
            "FG-SERVE-001",
            "the API key is too short or has characters that headers cannot carry",
            allowed="at least 8 printable ASCII characters",
            fix="python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
        )
    if key is None and not is_loopback(host):
        raise ConfigError(
            "FG-SERVE-001",
            f"--host {host} can be reached from other machines, and there is no API key",
            allowed="127.0.0.1 without a key, any address with one",
            fix="set FINEGRAFT_API_KEY or --api-key, or leave --host out",
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: FG-SERVE-004, the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named; with it, every small
    # answer on a kept connection took 40 ms instead of 2
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            "FG-SERVE-004",
            f"cannot listen on {host}:{port}: {error}",
            allowed="a free port and an address of this machine",
            fix="--port with another number (0 takes any free one)",
        ) from error


def serve(
    settings: engines.Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    limits: Limits | None = None,
    ready: Callable[[str, engines.Engine], None] = lambda url, engine: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; open answers are finished first.

    Args:
        settings: What to serve, and with which engine.
        host: Address to listen on.
        port: 0 takes any free one.
        key: What clients must send as a bearer token.
        limits: Queue, time and size.
        ready: Called with the address once the server answers.
        stopping: Called when it was told to stop and begins to finish what is open.

    Raises:
        ConfigError: FG-SERVE-001 to FG-SERVE-005; ModelError, AdapterError: those of loading.
    """
    check(host, key)
    require_extra("fastapi", "uvicorn")
    engine = engines.choose(settings)
    with contextlib.closing(bind(host, port)) as listener:
        asyncio.run(_serve(engine, listener, host, key, limits, ready, stopping))


async def _serve(
    engine: engines.Engine,
    listener: socket.socket,
    host: str,
    key: str | None,
    limits: Limits | None,
    ready: Callable[[str, engines.Engine], None],
    stopping: Callable[[], None],
) -> None:
    from finegraft.serving.app import Limits as Defaults
    from finegraft.serving.app import build

    try:
        await engine.start()
        app = build(engine, key=key, host=host, limits=limits or Defaults())
        number = listener.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{number}"
        await _until_stopped(app, listener, lambda: ready(url, engine), stopping)
    finally:
        await engine.stop()


async def _until_stopped(
    app: Any, listener: socket.socket, ready: Callable[[], None], stopping: Callable[[], None]
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to ``_stopping``, and says when it listens."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # query strings and addresses of clients are nobody's business
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
    )
    server = Server(config)
    with _stopping(server, stopping):
        await server.serve(sockets=[listener])
        # so that no engine waits for an answer to be whole
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)


@contextlib.contextmanager
def _stopping(server: Any, stopping: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the server, the second time at once."""
    loop = asyncio.get_running_loop()
    errors = logging.getLogger("uvicorn.error")
    was_off = errors.disabled

    def hang_up() -> None:
        errors.disabled = True  # it reports cancelled requests as failures
        for task in list(server.server_state.tasks):
            task.cancel()

    def stop(*_: Any) -> None:
        first = not server.should_exit
        server.force_exit, server.should_exit = not first, True
        loop.call_soon_threadsafe(stopping if first else hang_up)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        errors.disabled = was_off
        for number, handler in before.items():
            signal.signal(number, handler)
