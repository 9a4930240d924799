"""vLLM in an environment of its own, for machines with a GPU.

What: ``vllm serve`` runs as a child process of the interpreter that is named, on an address of this
machine behind a random key; requests go there. How: a base folder with adapters as LoRA modules.
Constraint: vLLM pins versions that differ from ours, so it is never imported here. Trade-off: not
yet run against vLLM itself; the tests put a small stand-in in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from finegraft.core.errors import ModelError
from finegraft.serving.engines import _upstream, is_gguf
from finegraft.serving.engines._contract import (
    CHAT,
    COMPLETIONS,
    JSON_SCHEMA,
    Ask,
    Embedded,
    EngineKind,
    Piece,
    Served,
    Settings,
)
from finegraft.serving.engines.inprocess import base_id, require_distinct

_START_SECONDS = 900.0  # large models are compiled first
_STOP_SECONDS = 20.0


class Vllm:
    """See the module."""

    features = frozenset({CHAT, COMPLETIONS, JSON_SCHEMA})

    def __init__(self, settings: Settings):
        self.settings, self.slots = settings, settings.slots
        self.served: tuple[Served, ...] = ()
        self._process: asyncio.subprocess.Process | None = None
        self._at = _upstream.Address("127.0.0.1", 0, secrets.token_urlsafe(32))

    def _plan(self) -> list[str]:
        """The command line; sets ``served``."""
        from finegraft import opening
        from finegraft.models.locate import locate

        settings = self.settings
        located = locate(settings.model)
        adapters = {name: locate(folder).path for name, folder in settings.adapters.items()}
        base, first = located, settings.name or base_id(settings.model)
        if located.kind == "adapter":
            base = opening.base_of(located)
            adapters = {first: located.path, **adapters}
            first = base_id(base.name)
        names = [*(Served(name, first) for name in adapters), Served(first)]
        require_distinct(names)
        self.served = tuple(names if located.kind == "adapter" else names[-1:] + names[:-1])
        words = ["-m", "vllm.entrypoints.cli.main", "serve", str(base.path)]
        words += ["--host", self._at.host, "--port", str(self._at.port)]
        words += ["--served-model-name", first, "--max-num-seqs", str(settings.slots)]
        if settings.context:
            words += ["--max-model-len", str(settings.context)]
        if adapters:
            words += ["--enable-lora", "--lora-modules"]
            words += [f"{name}={path}" for name, path in adapters.items()]
        return words

    async def start(self) -> None:
        """Start the child and wait until it answers.

        Raises:
            ModelError: FG-SERVE-007, it ended before it answered, or took too long.
        """
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._at = _upstream.Address("127.0.0.1", port, self._at.key)
        words = await asyncio.to_thread(self._plan)
        # the key goes through the environment, because others can read command lines
        environment = {**os.environ, "VLLM_API_KEY": self._at.key}
        self._process = await asyncio.create_subprocess_exec(
            str(self.settings.vllm_python), *words, env=environment
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await self._healthy():
                    if self._process.returncode is not None:
                        raise _no_start(f"ended with status {self._process.returncode}")
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise _no_start(f"did not answer within {_START_SECONDS:g} s") from None

    async def _healthy(self) -> bool:
        try:
            async with _upstream.request(self._at, "/health") as found:
                return found.status == 200
        except ModelError:
            return False

    async def stop(self) -> None:
        """End the child, by force where it does not go."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Pass the request on."""
        body: dict[str, Any] = _upstream.body_of(ask)
        if body["top_k"] == 0:
            del body["top_k"]  # 0 means off here, -1 there
        async with aclosing(_upstream.answer(self._at, ask, body)) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(self, model: str, texts: list[str | list[int]]) -> Embedded:
        """Not this engine's business; ``features`` says so."""
        raise NotImplementedError


def _no_start(why: str) -> ModelError:
    return ModelError(
        "FG-SERVE-007",
        f"vLLM {why}",
        allowed="an interpreter whose environment has vLLM, and a GPU that holds the model",
        fix="its messages above say what it lacks",
    )


def _unfit(settings: Settings) -> str | None:
    python = settings.vllm_python
    if python is None or not os.access(Path(python), os.X_OK):
        return f"--vllm-python is {python}, which is not an interpreter"
    return "it is a GGUF file" if is_gguf(settings.model) else None


ENGINE = EngineKind(
    summary="vLLM in an environment of its own (--vllm-python)", unfit=_unfit, make=Vllm
)
