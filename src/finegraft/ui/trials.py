"""Trying a run: its model before and after training behind one ``finegraft serve``.

What: ``Trials`` starts a server child for a run, passes questions on and streams the answers back.
How: the child listens on this machine with a key that only this process knows; the page never
meets it. Constraint: one at a time, because each holds a model, and it ends with this server; one
that a killed server left behind is ended by the next. Trade-off: changing the run loads anew.

Units: seconds, tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import shlex
import shutil
import signal
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.core.paths import write_whole
from finegraft.serving.engines import _upstream as upstream
from finegraft.ui import processes, replies
from finegraft.ui.jobs import words_of
from finegraft.ui.processes import Process
from finegraft.ui.workspace import Workspace

BASE, TUNED = "base", "tuned"
STARTING, READY, FAILED = "starting", "ready", "failed"
_KEY_VARIABLE = "FINEGRAFT_API_KEY"
_END_SECONDS = 5.0
_SHOWN_LETTERS = 4000
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")
_ID = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Trial:
    """A server child.

    Attributes:
        models: Of ``base`` and ``tuned``, those that it serves.
        key: What it wants; shown to nobody.
    """

    id: str
    run: str
    models: tuple[str, ...]
    command: str
    folder: Path
    process: Process
    child: Any
    key: str

    def _told(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / processes.STDOUT).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def address(self) -> upstream.Address | None:
        """Where it answers; None before it does."""
        url = self._told().get("url")
        place = urlsplit(url) if url else None
        return upstream.Address("127.0.0.1", place.port, self.key) if place and place.port else None

    @property
    def state(self) -> str:
        """starting, ready or failed."""
        if self.child.poll() is not None:
            return FAILED
        return READY if self.address else STARTING

    def as_dict(self) -> dict[str, Any]:
        """For the page."""
        state = self.state
        values: dict[str, Any] = {
            "id": self.id,
            "run": self.run,
            "state": state,
            "models": list(self.models),
            "command": self.command,
            "output": self._said(),
            "error": None,
        }
        if state == FAILED:
            told = self._told().get("error") or {}
            values["error"] = {
                "code": told.get("code"),
                "message": told.get("found") or self._said(),
                "allowed": told.get("allowed"),
                "fix": told.get("fix"),
            }
        return values

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            return words_of((self.folder / processes.STDERR).read_bytes())[-_SHOWN_LETTERS:].strip()
        return ""

    def end(self) -> None:
        """Stop the child, kindly and then not."""
        self.process.signal(signal.SIGINT, group=True)
        _wait(self.child, _END_SECONDS)
        self.process.signal(signal.SIGKILL, group=True)
        self.child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _wait(child: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


class Trials:
    """The run that is being tried.

    Args:
        space: Whose runs they are.
    """

    def __init__(self, space: Workspace):
        self.space = space
        self.folder = space.own / "try"
        self._current: Trial | None = None
        self._lock = asyncio.Lock()
        self._end_left_behind()

    def _end_left_behind(self) -> None:
        """End what a server that was killed has left running."""
        for file in self.folder.glob("*/process.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found = Process(**json.loads(file.read_text(encoding="utf-8")))
                found.signal(signal.SIGTERM, group=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def start(self, run: Path) -> Trial:
        """Load a run; the one that is loaded already is kept, another one is ended."""
        name = self.space.name_of(run)
        async with self._lock:
            found = self._current
            if found is not None and found.run == name and found.state != FAILED:
                return found
            await self._end()
            self._current = await asyncio.to_thread(self._start, run, name)
            return self._current

    def _start(self, run: Path, name: str) -> Trial:
        words, models = _words(run, name, self.space)
        identity, key = secrets.token_hex(6), secrets.token_urlsafe(32)
        folder = self.folder / identity
        folder.mkdir(parents=True)
        child = processes.start(words, folder, self.space.root, {_KEY_VARIABLE: key})
        process = Process.of(child.pid)
        write_whole(folder / "process.json", json.dumps(vars(process)))
        command = shlex.join(["finegraft", *words])
        return Trial(identity, name, models, command, folder, process, child, key)

    def get(self, identity: str) -> Trial:
        """The trial of an id.

        Raises:
            ConfigError: FG-UI-020, it has ended.
        """
        if self._current is None or self._current.id != identity:
            raise ConfigError(
                "FG-UI-020",
                f"'{identity[:20]}' is no run that is loaded for trying",
                allowed="the run that was loaded last",
                fix="load the run again",
            )
        return self._current

    def all(self) -> list[Trial]:
        """What is loaded."""
        return [self._current] if self._current else []

    async def stop(self, identity: str) -> None:
        """End a trial."""
        self.get(identity)
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        found, self._current = self._current, None
        if found is not None:
            await asyncio.to_thread(found.end)

    async def close(self) -> None:
        """End what is loaded, with the server."""
        await self._end()

    async def chat(
        self, trial: Trial, body: dict[str, Any], closed: asyncio.Event
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer of one of the two models as events."""
        began, tokens, reason = time.monotonic(), 0, None
        try:
            address = trial.address
            assert address is not None  # ``asked`` looked
            async with upstream.request(address, "/v1/chat/completions", body) as found:
                if found.status != 200:
                    raise upstream.refused(found.status, await found.read())
                async for event in found.events():
                    if closed.is_set():
                        return
                    if "error" in event:
                        raise upstream.refused(400, json.dumps(event).encode())
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in event.get("choices", ()):
                        reason = choice.get("finish_reason") or reason
                        delta = choice.get("delta") or {}
                        text = delta.get("content") or delta.get("reasoning_content")
                        if text:
                            yield replies.event("token", {"text": text})
        except FinegraftError as error:
            yield replies.event("error", {"error": replies.error_values(error)})
            return
        seconds = round(time.monotonic() - began, 2)
        yield replies.event("end", {"reason": reason, "tokens": tokens, "seconds": seconds})


def _words(run: Path, name: str, space: Workspace) -> tuple[list[str], tuple[str, ...]]:
    """The command that serves a run, and which models that gives.

    Raises:
        ConfigError: FG-UI-021, the run has saved nothing yet.
    """
    if (run / "model").is_dir():  # every weight was trained: the base is another model
        return ["serve", name, "--name", TUNED, "--port", "0"], (TUNED,)
    if not (run / "adapter").is_dir():
        raise ConfigError(
            "FG-UI-021",
            f"{name} has no adapter yet",
            allowed="a run that came to its end",
            fix=f"finegraft resume {shlex.quote(name)}",
        )
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    model = Path(str(settings["model"]))
    base = space.name_of(model) if model.is_relative_to(space.root) else str(model)
    words = ["serve", base, "--name", BASE, "--adapter", f"{TUNED}={name}"]
    words += ["--load-in-4bit"] if settings.get("load_in_4bit") else []
    return [*words, "--port", "0"], (BASE, TUNED)


def asked(trial: Trial, sent: dict[str, Any]) -> dict[str, Any]:
    """What the child is asked, from what the page sends.

    Raises:
        ConfigError: FG-UI-021 it is not ready, FG-UI-009 a field that is wrong.
    """
    if trial.state != READY:
        raise ConfigError(
            "FG-UI-021",
            f"{trial.run} is not loaded ({trial.state})",
            allowed="a run whose state is ready",
            fix="wait until it is loaded",
        )
    which, messages = sent.get("which", TUNED), sent.get("messages")
    if which not in trial.models or not isinstance(messages, list) or not messages:
        raise ConfigError(
            "FG-UI-009",
            f"'which' is {which!r}, with {len(messages) if isinstance(messages, list) else 'no'} "
            "messages",
            allowed=f"which: {', '.join(trial.models)}; messages: at least one",
            fix="ask one of these models something",
        )
    body = {key: sent[key] for key in _SAMPLING if sent.get(key) is not None}
    more = {"stream": True, "stream_options": {"include_usage": True}}
    return {**body, **more, "model": which, "messages": messages}
