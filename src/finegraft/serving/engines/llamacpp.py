"""llama.cpp, through the ``xllamacpp`` package: GGUF files and GGUF adapters.

What: its server runs in this process on an address of this machine, behind a random key that only
this engine knows; requests are checked, named and counted here and answered there. How: adapters
are loaded once and chosen by scale for each request. Constraint: a client that goes closes the
inner connection, which llama.cpp notices within a second, also while it reads a prompt. Trade-off:
the chat template is the one in the file, rendered by llama.cpp as it would be anywhere else.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finegraft.core.errors import DataError, ModelError
from finegraft.serving.engines import _upstream, is_gguf
from finegraft.serving.engines._contract import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    JSON_SCHEMA,
    Ask,
    Embedded,
    EngineKind,
    Piece,
    Served,
    Settings,
)
from finegraft.serving.engines.inprocess import require_distinct

_CONTEXT = 4096  # tokens of a slot, unless set
_ENCODERS = ("bert", "nomic-bert", "jina-bert-v2", "modern-bert")


class LlamaCpp:
    """See the module."""

    def __init__(self, settings: Settings):
        self.settings, self.slots = settings, settings.slots
        self._path = Path(settings.model).expanduser().resolve()
        first = settings.name or self._path.stem
        names = [Served(first), *(Served(name, first) for name in settings.adapters)]
        require_distinct(names)
        self.served = tuple(names)
        self.features = frozenset({CHAT, COMPLETIONS, JSON_SCHEMA})
        self._server: Any = None
        self._longest = 0  # bytes of the longest token; 0: not known
        self._at = _upstream.Address("127.0.0.1", 0, secrets.token_urlsafe(32))

    async def start(self) -> None:
        """Load the file and its adapters.

        Raises:
            ConfigError: FG-SERVE-002, the package is missing.
            ModelError: FG-MODEL-005 a damaged file, FG-SERVE-006 one that llama.cpp refuses.
        """
        from finegraft.models.gguf import read_header
        from finegraft.serving.run import require_extra

        require_extra("xllamacpp")
        header = await asyncio.to_thread(read_header, self._path)
        if header.architecture in _ENCODERS:
            self.features = frozenset({EMBEDDINGS})
        self._longest = header.longest_token
        self._server = await asyncio.to_thread(self._load)
        found = urlsplit(self._server.listening_address)
        self._at = _upstream.Address(found.hostname or "127.0.0.1", found.port or 0, self._at.key)

    def _require_room(self, texts: Iterable[Any]) -> None:
        """Refuse what cannot fit, before llama.cpp spends seconds on its tokens.

        Raises:
            DataError: FG-SERVE-020.
        """
        context = self.settings.context or _CONTEXT
        size = sum(len(text) if isinstance(text, str) else self._longest for text in texts)
        if self._longest and size > context * self._longest:
            raise DataError(
                "FG-SERVE-020",
                f"the prompt has {size} characters",
                allowed=f"{context} tokens for prompt and answer together",
                fix="shorten the conversation, or start the server with a larger --context",
            )

    def _load(self) -> Any:
        import xllamacpp

        parameters = self._parameters()
        try:
            return xllamacpp.Server(parameters)
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(
                "FG-SERVE-006",
                f"llama.cpp cannot load {self._path.name} with its adapters: {error}",
                allowed="a GGUF file, and GGUF adapters that were made for it",
                fix="finegraft verify tells what is wrong with an exported file",
            ) from error

    def _parameters(self) -> Any:
        import xllamacpp

        settings = self.settings
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        threads = settings.threads or usable or os.cpu_count() or 1
        out = xllamacpp.CommonParams()
        out.model.path = str(self._path)
        out.model_alias = {self.served[0].id}
        out.n_parallel = settings.slots
        out.n_ctx = (settings.context or _CONTEXT) * settings.slots
        out.cpuparams.n_threads = out.cpuparams_batch.n_threads = threads
        out.n_threads_http = settings.slots + 2
        out.api_keys = [self._at.key]
        out.warmup, out.use_jinja, out.ui = False, True, False
        out.endpoint_slots = out.endpoint_props = out.endpoint_metrics = False
        out.prefill_assistant = False  # an answer is always a new turn, as in the other engines
        # a second cache, of up to 8 GiB, for prompts that no slot holds any more: not ours to take
        out.cache_ram_mib = 0
        out.verbosity = 0
        out.embedding = EMBEDDINGS in self.features
        out.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(Path(file).expanduser().resolve()), 1.0)
            for file in settings.adapters.values()
        ]
        return out

    async def stop(self) -> None:
        """End llama.cpp's threads."""
        server, self._server = self._server, None
        await asyncio.to_thread(_drop, [server])
        del server

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Answer with the adapter that the id stands for, or none."""
        said = ask.prompt if ask.messages is None else [m["content"] for m in ask.messages]
        self._require_room([said] if isinstance(said, str) else said or ())
        body = _upstream.body_of(ask)
        if self.settings.adapters:
            body["lora"] = [
                {"id": number, "scale": 1.0 if name == ask.model else 0.0}
                for number, name in enumerate(self.settings.adapters)
            ]
        async with aclosing(_upstream.answer(self._at, ask, body)) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(self, model: str, texts: list[str | list[int]]) -> Embedded:
        """Vectors of length 1."""
        for text in texts:
            self._require_room([text])
        if not all(texts):
            raise DataError("FG-SERVE-022", "an input is empty", fix="send some text")
        body = {"model": model, "input": texts}
        async with _upstream.request(self._at, "/v1/embeddings", body) as found:
            data = await found.read()
            if found.status != 200:
                raise _upstream.refused(found.status, data)
        return _upstream.embedded(data)


def _drop(servers: list[Any]) -> None:
    """Let go of the server in this thread: its destructor waits for its own threads."""
    servers.clear()


def _unfit(settings: Settings) -> str | None:
    if not is_gguf(settings.model):
        return "it is not a GGUF file (finegraft export MODEL --to gguf:q8_0 writes one)"
    folders = [name for name, file in settings.adapters.items() if not is_gguf(file)]
    return f"adapter {folders[0]} is not a GGUF file" if folders else None


ENGINE = EngineKind(
    summary="GGUF files and GGUF adapters, through xllamacpp", unfit=_unfit, make=LlamaCpp
)
