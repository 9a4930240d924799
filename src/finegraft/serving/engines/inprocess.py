"""The engine in this process: any model that can be opened, adapters unmerged on the disk.

What: a base and its adapters, each under its own id. How: one thread owns the model and moves lanes
on (``_lanes``); our decoder runs on merged copies of the weights, one for each id, which share the
embedding; what it refuses goes through the model's ``generate`` with adapters switched before each
batch. Constraint: prompts are rendered by ``data.render``, as in training. Trade-off: every adapter
costs the memory of the layers once more, and in return all of them answer at the base's speed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError, DataError, FinegraftError, ModelError
from finegraft.serving.engines import _tools
from finegraft.serving.engines._contract import (
    CHAT,
    COMPLETIONS,
    Ask,
    Embedded,
    EngineKind,
    Piece,
    Served,
    Settings,
)
from finegraft.serving.engines._worker import FAILED, Post, Worker

log = logging.getLogger(__name__)

_CONTEXT = 8192  # tokens, unless set: a cache for each slot may grow to this


def base_id(name: str) -> str:
    """The id of a model: a hub or packaged name as it is, the last part of a path."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


@dataclass
class _Voice:
    """One id: its tokenizer, lane and limits."""

    tokenizer: Any
    lane: Any
    ends: frozenset[int]
    vocabulary: int
    longest_token: int  # characters
    pad: int


class InProcess:
    """See the module."""

    features = frozenset({CHAT, COMPLETIONS})

    def __init__(self, settings: Settings):
        self.settings, self.slots = settings, settings.slots
        self.served: tuple[Served, ...] = ()
        self._voices: dict[str, _Voice] = {}
        self._worker: Worker | None = None
        # The one thread that loads the model and answers. libgomp counts a team for each thread
        # that ever ran a parallel loop, and with more teams than cores its barriers sleep instead
        # of spinning: 45 to 55 tokens a second of one stream on two cores instead of 76, 235 of
        # eight instead of 306 (nothing else running, GOMP_SPINCOUNT not set)
        self._thread = ThreadPoolExecutor(1, "finegraft-serving")
        self._work: Future[None] | None = None
        self._post = Post()
        self._rendering = threading.Lock()
        self.context = settings.context or _CONTEXT
        self._adapters: dict[str, str] = {}  # peft's names by id

    async def start(self) -> None:
        """Open the model and its adapters, and merge a copy for each id."""
        self._post.loop = asyncio.get_running_loop()
        await asyncio.wrap_future(self._thread.submit(self._load))
        lanes = [voice.lane for voice in self._voices.values()]
        self._worker = Worker(lanes, self._post.flush)
        self._work = self._thread.submit(self._worker.run)

    async def stop(self) -> None:
        """End the thread."""
        if self._worker is not None and self._work is not None:
            for row in self._worker.rows:
                row.cancelled = True
            self._worker.inbox.put(None)
            await asyncio.wrap_future(self._work)
        self._thread.shutdown(wait=False)

    def _load(self) -> None:
        import torch

        from finegraft import opening
        from finegraft.inference.generate import context_length
        from finegraft.models.locate import locate

        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        opened = opening.open_model(self.settings.model, load_in_4bit=self.settings.load_in_4bit)
        located, model = opened.located, opened.model
        folders = {name: locate(folder) for name, folder in self.settings.adapters.items()}
        for name, found in folders.items():
            if found.kind != "adapter":
                raise ConfigError(
                    "FG-SERVE-005",
                    f"--adapter {name}={found.name} is a whole model",
                    allowed="folders of adapters",
                    fix="serve it by itself, as MODEL",
                )
        names: list[Served] = []
        if located.kind == "adapter":
            base = opening.base_of(located)
            own = self.settings.name or base_id(_run_name(self.settings.model))
            first = base_id(base.name)
            first = f"{first}-base" if first == own else first
            self._adapters[own] = model.active_adapter
            names.append(Served(own, first))
            tokenizers = {own: opened.tokenizer, first: opening.open_tokenizer(base)}
        else:
            first = self.settings.name or base_id(self.settings.model)
            tokenizers = {first: opened.tokenizer}
        names.append(Served(first))
        for number, (name, found) in enumerate(folders.items()):
            if hasattr(model, "peft_config"):
                peft_name = f"served{number}"
                opening.add_saved(model, peft_name, found.path)
            else:
                model = opening.attach_saved(model, found.path)
                peft_name = model.active_adapter
            self._adapters[name] = peft_name
            names.append(Served(name, first))
            tokenizers[name] = opening.open_tokenizer(found)
        require_distinct(names)
        self.context = min(self.context, context_length(model) or self.context)
        model.eval()
        for served in names:
            self._voices[served.id] = self._voice(model, served.id, tokenizers[served.id])
        self.served = tuple(names)

    def _voice(self, model: Any, name: str, tokenizer: Any) -> _Voice:
        from finegraft.inference import decode
        from finegraft.inference.generate import pad_id, stop_ids
        from finegraft.models import swap
        from finegraft.serving.engines import _lanes

        core, peft_name = swap.core(model), self._adapters.get(name)
        switch = self._switch(model, peft_name)
        switch()
        config = model.peft_config[peft_name] if peft_name else None
        virtual = bool(getattr(config, "is_prompt_learning", False))
        stops = stop_ids(core, tokenizer)
        pad = pad_id(tokenizer, stops)
        weights, reason = None, "it adds virtual tokens"
        if not virtual:
            weights, reason = decode.merged_weights(core)
        decode.detach(core)  # forgets its reference; the copy is ours
        lane: Any
        if weights is not None:
            lane = _lanes.Joining(weights, self.slots, self._post.flush)
        else:
            log.info("%s answers in batches, not continuously: %s", name, reason)
            answers = model if virtual else core
            lane = _lanes.Together(answers, switch, self.slots, pad, self._post.flush)
        longest = max(map(len, tokenizer.get_vocab()))
        size = core.get_input_embeddings().weight.shape[0]
        return _Voice(tokenizer, lane, frozenset(stops), size, longest, pad)

    @staticmethod
    def _switch(model: Any, peft_name: str | None) -> Callable[[], Any]:
        from finegraft.adapters import named

        if peft_name is not None:
            return lambda: named.switch(model, peft_name)
        if hasattr(model, "peft_config"):
            return lambda: named.disable(model)
        return lambda: None

    def _prompt(self, voice: _Voice, ask: Ask) -> list[int]:
        """Ids of the prompt.

        Raises:
            DataError: FG-SERVE-020 too long, FG-SERVE-021 tools that cannot be had, FG-SERVE-022
                what the tokenizer or its template refuses; and those of ``render_prompt``.
        """
        from finegraft.data.render import render_prompt

        if isinstance(ask.prompt, tuple):
            if not all(0 <= token < voice.vocabulary for token in ask.prompt):
                raise DataError(
                    "FG-SERVE-022",
                    "the prompt has ids that are no tokens",
                    allowed=f"0 to {voice.vocabulary - 1}",
                    fix="send the prompt as text, or ids of this model's own tokenizer",
                )
            return self._fits(list(ask.prompt), ask)
        if ask.tools:
            _require_tools(voice.tokenizer, ask)
        messages = [{"role": "text", "content": ask.prompt}]
        if ask.messages is not None:
            messages = [_tools.spoken(message) for message in ask.messages]
        characters = sum(len(str(message["content"])) for message in messages)
        if characters > self.context * voice.longest_token:  # no need to tokenise it
            raise self._too_long(f"{characters} characters")
        try:
            with self._rendering:
                ids = render_prompt(messages, voice.tokenizer, ask.tools or None)
        except FinegraftError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                "FG-SERVE-022",
                f"the chat template cannot render these messages: {type(error).__name__}",
                fix="send messages of plain text",
            ) from error
        return self._fits(list(ids), ask)

    def _fits(self, ids: list[int], ask: Ask) -> list[int]:
        if not ids:
            raise DataError("FG-SERVE-022", "the prompt has no tokens", fix="send some text")
        if len(ids) + 1 > self.context:
            raise self._too_long(f"{len(ids)} tokens")
        return ids

    def _too_long(self, size: str) -> DataError:
        return DataError(
            "FG-SERVE-020",
            f"the prompt has {size}",
            allowed=f"{self.context} tokens for prompt and answer together",
            fix="shorten the conversation, or start the server with a larger --context",
        )

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Answer; with tools offered, in one piece at the end."""
        from finegraft.serving.engines._choose import Chooser
        from finegraft.serving.engines._lanes import Row
        from finegraft.serving.engines._text import Writer

        voice = self._voices[ask.model]
        prompt = await asyncio.to_thread(self._prompt, voice, ask)
        room = self.context - len(prompt)
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        row = Row(
            prompt=prompt,
            longest=min(room, ask.options.max_tokens or room),
            ends=voice.ends,
            chooser=Chooser(ask.options, voice.tokenizer, voice.vocabulary),
            writer=Writer(voice.tokenizer, ask.options.stop),
            give=lambda piece: self._post.put(pieces, piece),
        )
        assert self._worker is not None
        self._worker.inbox.put((voice.lane, row))
        said: list[Piece] = []
        try:
            while True:
                piece = await pieces.get()
                if piece.reason == FAILED:
                    raise _failed()
                if not ask.tools:
                    yield piece
                else:
                    said.append(piece)
                if piece.reason is not None:
                    break
        finally:
            row.cancelled = True
        if said:
            yield _with_calls(said, ask)

    async def embed(self, model: str, texts: list[str | list[int]]) -> Embedded:
        """Not this engine's business; ``features`` says so."""
        raise NotImplementedError


def _failed() -> ModelError:
    return ModelError(
        "FG-SERVE-023", "the engine failed on this batch of requests", fix="see the server's log"
    )


def _with_calls(said: list[Piece], ask: Ask) -> Piece:
    """All of an answer as one piece, with the tool calls read out of it."""
    names = {tool["function"].get("name") for tool in ask.tools}
    text, calls = _tools.parse("".join(piece.text for piece in said), names)
    last = said[-1]
    return Piece(
        text=text,
        tokens=tuple(token for piece in said for token in piece.tokens),
        tool_calls=tuple(calls),
        reason="tool_calls" if calls else last.reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
    )


def _require_tools(tokenizer: Any, ask: Ask) -> None:
    if "tools" not in str(getattr(tokenizer, "chat_template", None) or ""):
        raise DataError(
            "FG-SERVE-021",
            "tools were offered, and this model's chat template does not know tools",
            allowed="models whose template names tools",
            fix="leave tools out",
        )
    if ask.tool_choice not in (None, "auto"):
        raise DataError(
            "FG-SERVE-021",
            "tool_choice forces a call, which this engine cannot do",
            allowed="auto, none",
            fix="export the model to GGUF and serve that file",
        )


def _run_name(model: str) -> str:
    """The folder that names an adapter: a run's own where its ``adapter`` folder was given."""
    path = Path(model).expanduser()
    inside_run = path.name == "adapter" and (path.parent / "config.yaml").is_file()
    return str(path.parent) if inside_run else model


def require_distinct(names: list[Served]) -> None:
    """Refuse two models under one id.

    Raises:
        ConfigError: FG-SERVE-005.
    """
    ids = [served.id for served in names]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ConfigError(
            "FG-SERVE-005",
            f"several models would be called {', '.join(twice)}",
            allowed="one id each",
            fix="--name for the model, --adapter other=FOLDER for an adapter",
        )


def _unfit(settings: Settings) -> str | None:
    files = [name for name, folder in settings.adapters.items() if folder.endswith(".gguf")]
    return f"adapter {files[0]} is a file, not a folder" if files else None


ENGINE = EngineKind(
    summary="any model or adapter folder, with our decoder where it knows the family",
    unfit=_unfit,
    make=InProcess,
)
