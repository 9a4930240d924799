"""The page's server in a thread, on a real socket, and what asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from finegraft.serving.run import bind
from finegraft.ui.app import build
from finegraft.ui.desk import Desk
from finegraft.ui.workspace import Workspace


class Asker:
    """One browser: an address, and the cookie it was given."""

    def __init__(self, port: int):
        self.port, self.cookie = port, ""
        self.headers: dict[str, str] = {}

    def __call__(
        self, method: str, path: str, body: Any = None, raw: Any = None, **headers: str
    ) -> Any:
        """Ask and return the response with ``.json``; ``raw`` is a body as it is."""
        data, sent = raw, {k.replace("_", "-"): v for k, v in headers.items()}
        if self.cookie:
            sent.setdefault("Cookie", self.cookie)
        if body is not None:
            data, sent["Content-Type"] = json.dumps(body), "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            response.body = response.read()
        with contextlib.suppress(ValueError):
            response.json = json.loads(response.body)
        return response

    def sign_in(self, token: str) -> Asker:
        """Open an address's token."""
        answer = self("POST", "/api/session", {"token": token})
        assert answer.status == 204
        self.cookie = answer.getheader("Set-Cookie").partition(";")[0]
        return self

    def stream(self, path: str, **headers: str) -> http.client.HTTPResponse:
        """An answer that is still coming; ``events`` reads it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers={"Cookie": self.cookie, **headers})
        return connection.getresponse()


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, Any, str]]:
    """Kind, values and id of each server-sent event."""
    kind, place = "", ""
    while line := response.readline():
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            kind, place = value, ""
        elif key == "id":
            place = value
        elif key == "data":
            yield kind, json.loads(value), place


@contextlib.contextmanager
def served(folder: Path, **limits: Any) -> Iterator[tuple[Asker, Desk]]:
    """Run the server over a workspace, in this process; it works in the current folder."""
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        desk = Desk.of(Workspace(folder), listener.getsockname()[1])
        config = uvicorn.Config(
            build(desk, **limits), log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Asker(desk.port), desk
        finally:
            server.should_exit = True
            desk.feeds.close()
            thread.join(20)
    assert not thread.is_alive()


def write_run(run: Path, steps: int = 0, *, ended: bool = True, **config: Any) -> Path:
    """A run folder with so many steps, as training writes it; returns its events."""
    run.mkdir(parents=True)
    settings = {"model": "demo", "data": "data/rows.jsonl", "method": "lora", **config}
    (run / "config.yaml").write_text(json.dumps(settings))
    told = [{"type": "run", "time": time.time(), "config": settings}]
    told += [step(number) for number in range(1, steps + 1)]
    if ended:
        told.append({"type": "end", "time": time.time(), "step": steps, "loss": 1.0, "seconds": 9})
    events = run / "events.jsonl"
    events.write_text("".join(json.dumps(event) + "\n" for event in told))
    return events


def step(number: int, loss: float | None = None) -> dict[str, Any]:
    """A step event."""
    return {
        "type": "step",
        "time": 1.0,
        "step": number,
        "total_steps": 1000,
        "loss": 3.0 / number if loss is None else loss,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 400.0,
        "memory_bytes": 10**9,
        "seconds": float(number),
    }
