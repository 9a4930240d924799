"""A small HTTP client for an engine that is a server itself.

What: ``request`` sends JSON to an address of this machine and reads an answer or a stream of
events. How: asyncio's sockets with ``h11``, which uvicorn brings along. Constraint: leaving the
block closes the connection, which is how such engines learn that nobody reads on. Trade-off: a
connection for each request, 0.2 ms on a loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from finegraft.core.errors import DataError, FinegraftError, ModelError
from finegraft.serving.engines._contract import Ask, Embedded, Piece, Token

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Address:
    """Where an engine listens, and the key that it wants."""

    host: str
    port: int
    key: str


class Answer:
    """A status and a body that is still coming."""

    def __init__(self, status: int, connection: Any, reader: asyncio.StreamReader):
        self.status, self._connection, self._reader = status, connection, reader

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        import h11

        while True:
            event = await _next(self._connection, self._reader)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return

    async def read(self) -> bytes:
        """All of the body."""
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events that hold JSON objects, up to ``[DONE]``."""
        rest = b""
        async for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if data.startswith(b"{") and line.startswith(b"data:"):
                    yield json.loads(data)


async def _next(connection: Any, reader: asyncio.StreamReader) -> Any:
    import h11

    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            if isinstance(event, h11.ConnectionClosed):
                raise down("it closed the connection")
            return event
        connection.receive_data(await reader.read(_CHUNK_BYTES))


def down(why: str) -> ModelError:
    """The error for an engine that does not answer; its status is 503."""
    return ModelError(
        "FG-SERVE-024", f"the engine does not answer: {why}", fix="see the server's log"
    )


@contextlib.asynccontextmanager
async def request(
    at: Address, path: str, body: dict[str, Any] | None = None
) -> AsyncIterator[Answer]:
    """Send a request, POST where there is a body, and yield its answer; closed afterwards."""
    import h11

    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", f"{at.host}:{at.port}"), ("Authorization", f"Bearer {at.key}")]
    data = b"" if body is None else json.dumps(body, allow_nan=False).encode()
    if body is not None:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    head = h11.Request(method="GET" if body is None else "POST", target=path, headers=headers)
    try:
        reader, writer = await asyncio.open_connection(at.host, at.port)
    except OSError as error:
        raise down(str(error)) from error
    try:
        writer.write(connection.send(head))
        if data:
            writer.write(connection.send(h11.Data(data=data)))
        writer.write(connection.send(h11.EndOfMessage()))
        await writer.drain()
        response = await _next(connection, reader)
        yield Answer(response.status_code, connection, reader)
    except (ConnectionError, h11.RemoteProtocolError) as error:
        raise down(str(error)) from error
    finally:
        writer.close()


def body_of(ask: Ask) -> dict[str, Any]:
    """A request as OpenAI-compatible engines read it, streamed and with usage."""
    wanted = ask.options
    body: dict[str, Any] = {
        "model": ask.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
        "min_p": wanted.min_p,
        "frequency_penalty": wanted.frequency_penalty,
        "presence_penalty": wanted.presence_penalty,
    }
    if wanted.seed is not None:
        body["seed"] = wanted.seed % 2**32
    if wanted.max_tokens is not None:
        body["max_tokens"] = wanted.max_tokens
    if wanted.stop:
        body["stop"] = list(wanted.stop)
    if wanted.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in wanted.logit_bias.items()}
    if ask.messages is None:
        body["prompt"] = list(ask.prompt) if isinstance(ask.prompt, tuple) else ask.prompt
        if wanted.top_logprobs is not None:
            body["logprobs"] = wanted.top_logprobs
        return body
    body["messages"] = list(ask.messages)
    if wanted.top_logprobs is not None:
        body.update(logprobs=True, top_logprobs=wanted.top_logprobs)
    if ask.tools:
        body["tools"] = list(ask.tools)
        if ask.tool_choice is not None:
            body["tool_choice"] = ask.tool_choice
    if ask.response_format is not None:
        body["response_format"] = ask.response_format
    return body


async def answer(at: Address, ask: Ask, body: dict[str, Any]) -> AsyncIterator[Piece]:
    """Ask an engine and translate its stream.

    Raises:
        DataError: FG-SERVE-022, it refuses the request; FinegraftError: FG-SERVE-024, it is down.
    """
    path = "/v1/completions" if ask.messages is None else "/v1/chat/completions"
    reason, usage = None, {}
    async with request(at, path, body) as found:
        if found.status != 200:
            raise refused(found.status, await found.read())
        async for event in found.events():
            if "error" in event:
                raise refused(400, json.dumps(event).encode())
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                piece = _piece(choice)
                if piece.text or piece.reasoning or piece.tokens or piece.tool_calls:
                    yield piece
    if reason is None:
        raise down("its stream broke off")
    yield Piece(
        reason=reason,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=int(usage.get("completion_tokens", 0)),
    )


def refused(status: int, data: bytes) -> FinegraftError:
    try:
        problem = json.loads(data).get("error", {})
        message = problem.get("message") if isinstance(problem, dict) else problem
    except (ValueError, AttributeError):
        message = None
    if status in (401, 403, 404, 503):  # our own mistake, or one that is still loading
        return down(f"status {status}")
    return DataError(
        "FG-SERVE-022",
        f"the engine refuses the request: {str(message)[:500]}",
        fix="correct the request as it says",
    )


def _piece(choice: dict[str, Any]) -> Piece:
    delta = choice.get("delta") or {}
    shares = choice.get("logprobs") or {}
    return Piece(
        text=delta.get("content") or choice.get("text") or "",
        reasoning=delta.get("reasoning_content") or "",
        tokens=tuple(_token(entry) for entry in shares.get("content") or ()),
        tool_calls=tuple(delta.get("tool_calls") or ()),
    )


def _token(entry: dict[str, Any]) -> Token:
    text = entry.get("token", "")
    raw = entry.get("bytes")
    return Token(
        text=text,
        bytes=bytes(raw) if raw is not None else text.encode("utf-8", "replace"),
        logprob=float(entry.get("logprob") or 0.0),
        top=tuple(_token(other) for other in entry.get("top_logprobs") or ()),
    )


def embedded(data: bytes) -> Embedded:
    """Vectors of an embeddings answer, in the order of the inputs."""
    values = json.loads(data)
    rows = sorted(values["data"], key=lambda row: row["index"])
    tokens = int((values.get("usage") or {}).get("prompt_tokens", 0))
    return Embedded([[float(x) for x in row["embedding"]] for row in rows], tokens)
