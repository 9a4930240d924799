"""What every engine exports as ``ENGINE``, and what passes between it and the server.

What: ``Ask`` goes in, ``Piece`` objects come out. How: an engine is asynchronous on the outside and
does as it likes inside. Constraint: closing the iterator of an answer frees what the answer holds,
within one token or one second; the last piece of an answer, and no other, has a ``reason``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

CHAT, COMPLETIONS, EMBEDDINGS = "chat", "completions", "embeddings"
JSON_SCHEMA = "json_schema"


@dataclass(frozen=True)
class Settings:
    """What a server is started with, as far as engines are concerned.

    Attributes:
        model: A name that ``models.locate`` takes, or a GGUF file.
        name: The id that clients use; None: from ``model``.
        adapters: Folders (GGUF files with llama.cpp) by the id that clients use.
        engine: A name of ``ENGINES``, or ``auto``.
        slots: Answers at a time.
        context: Longest prompt and answer together, in tokens; None: the engine's default.
        threads: Of the processor; None: as the libraries choose.
        load_in_4bit: Quantize the base while loading (in-process engine).
        vllm_python: Interpreter of an environment with vLLM.
    """

    model: str
    name: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    engine: str = "auto"
    slots: int = 8
    context: int | None = None
    threads: int | None = None
    load_in_4bit: bool = False
    vllm_python: str | None = None


@dataclass(frozen=True)
class Served:
    """One model id; ``parent`` is the id of its base where it is an adapter."""

    id: str
    parent: str | None = None


@dataclass(frozen=True)
class Options:
    """How an answer is made.

    Attributes:
        max_tokens: None: until the context is full.
        temperature: 0 takes the likeliest token.
        top_k: 0: off.
        top_logprobs: Alternatives to report for each token; None: report nothing.
        logit_bias: Added to the logits of token ids.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """One request for an answer: ``messages`` of a chat, or a ``prompt`` to go on from."""

    model: str
    options: Options
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None


@dataclass(frozen=True)
class Token:
    """A token with the logarithm of its share, and its likeliest alternatives."""

    text: str
    bytes: bytes
    logprob: float
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: What was added; may be empty.
        reasoning: Thoughts that the engine tells apart from the answer.
        tokens: Their shares, where asked for.
        tool_calls: As the API's deltas have them.
        reason: ``stop``, ``length`` or ``tool_calls``; set in the last piece only.
        prompt_tokens: Set in the last piece, as is ``completion_tokens``.
    """

    text: str = ""
    reasoning: str = ""
    tokens: tuple[Token, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Embedded:
    """Vectors of texts, of length 1 each, and how many tokens they had together."""

    vectors: list[list[float]]
    tokens: int


class Engine(Protocol):
    """A loaded model that answers.

    Attributes:
        served: The ids that clients may use; the first is the default.
        slots: Answers at a time.
        features: Of ``CHAT``, ``COMPLETIONS``, ``EMBEDDINGS``, ``JSON_SCHEMA``.
    """

    served: tuple[Served, ...]
    slots: int
    features: frozenset[str]

    async def start(self) -> None:
        """Load; errors of models and adapters come from here."""

    async def stop(self) -> None:
        """Free everything; answers that are open end."""

    def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Answer; a ``DataError`` before the first piece refuses the request."""
        ...

    async def embed(self, model: str, texts: list[str | list[int]]) -> Embedded:
        """Turn texts into vectors."""
        ...


@dataclass(frozen=True)
class EngineKind:
    """One way of answering.

    Attributes:
        summary: One line for help texts and docs.
        unfit: Why it cannot serve these settings, or None.
        make: Makes the engine; loading is left to ``start``.
    """

    summary: str
    unfit: Callable[[Settings], str | None]
    make: Callable[[Settings], Engine]
