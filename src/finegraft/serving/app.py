"""The web application: endpoints over one engine.

What: ``build`` returns an ASGI application with the OpenAI endpoints, health, metrics, the OpenAPI
document and the chat page. How: FastAPI reads and checks bodies; every answer, streamed or not,
is an ``Answering`` that the client's disconnect cancels. Constraint: errors are OpenAI-shaped, also
those of the framework; CORS headers are never sent; the only file that is read is the page.
Trade-off: a stream's headers wait for its first token, so that a refusal still has a status.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from finegraft.core.errors import DataError, FinegraftError, did_you_mean
from finegraft.serving import metrics, replies
from finegraft.serving.answering import Answering, ClientGone
from finegraft.serving.engines import Ask, Embedded, Engine, Piece
from finegraft.serving.engines._contract import CHAT, COMPLETIONS, EMBEDDINGS, JSON_SCHEMA
from finegraft.serving.gate import Gate
from finegraft.serving.guard import Guard, Receive, Scope, Send
from finegraft.serving.requests import Chat, Completion, Embeddings

log = logging.getLogger(__name__)

_PATHS = {
    CHAT: "/v1/chat/completions",
    COMPLETIONS: "/v1/completions",
    EMBEDDINGS: "/v1/embeddings",
}
_GONE = 499  # nginx's status for a client that hung up; nobody reads it
# What a browser may do with the page: its own script and style, and this server.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self';"
    " img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        waiting: Requests in the queue, beyond those being answered.
        seconds: Longest time for one request.
        most_bytes: Of a request's body.
    """

    waiting: int = 64
    seconds: float = 600.0
    most_bytes: int = 4 << 20


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ProblemBody}
    for status in (400, 401, 404, 405, 408, 413, 415, 421, 422, 429, 503)
}


class Events(Response):
    """Server-sent events; an answer is closed with the response, whatever ends it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answering: Answering[Piece]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._answering = events, answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as they come."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._answering.close()


class Service:
    """The endpoints over one engine."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self.gate = Gate(engine.slots, limits.waiting)
        self.metrics = metrics.Metrics()
        self.created = int(time.time())

    def _known(self, name: str | None, feature: str) -> str:
        """The model id to use; refuses unknown ones and endpoints that the engine lacks."""
        if feature not in self.engine.features:
            raise DataError(
                "FG-SERVE-018",
                f"this model does not do {feature}",
                allowed=", ".join(_PATHS[f] for f in _PATHS if f in self.engine.features),
                fix="use one of these endpoints",
            )
        names = [served.id for served in self.engine.served]
        if name is not None and name not in names:
            raise DataError(
                "FG-SERVE-016",
                f"unknown model {_short(repr(name))}",
                allowed=", ".join(names),
                fix=did_you_mean(name, names),
            )
        return name or names[0]

    async def chat(self, body: Chat, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(body, request, CHAT)

    async def completions(self, body: Completion, request: Request) -> Response:
        """Go on from a text."""
        return await self._answer(body, request, COMPLETIONS)

    async def _answer(self, body: Chat | Completion, request: Request, kind: str) -> Response:
        model = self._known(body.model, kind)
        try:
            ask = body.ask(model)
        except ValueError as error:
            raise _invalid(str(error)) from error
        if ask.response_format is not None and JSON_SCHEMA not in self.engine.features:
            raise DataError(
                "FG-SERVE-019",
                f"response_format {ask.response_format.get('type')!r} with this engine",
                allowed="response_format of the type text",
                fix="export the model to GGUF and serve that file: llama.cpp keeps to a schema",
            )
        shares = ask.options.top_logprobs is not None
        reply = replies.Reply(kind == CHAT, model, shares, body.usage_wanted)
        answering: Answering[Piece] = Answering(
            lambda: self._counted(ask),
            self.gate,
            self.limits.seconds,
            request.receive,
            self._count_gone,
        )
        pieces = aiter(answering)
        try:
            if not body.stream:
                whole = [piece async for piece in pieces]
                await answering.close()
                return JSONResponse(reply.whole(whole))
            first = await anext(pieces)
        except BaseException:
            await answering.close()
            raise
        return Events(_events(reply, first, pieces), answering)

    def _count_gone(self) -> None:
        self.metrics.gone += 1

    async def _counted(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        began = time.monotonic()
        async with contextlib.aclosing(self.engine.answer(ask)) as pieces:
            async for piece in pieces:
                yield piece
                if piece.reason is not None:
                    took = time.monotonic() - began
                    self.metrics.answered(took, piece.prompt_tokens, piece.completion_tokens)

    async def embeddings(self, body: Embeddings, request: Request) -> Response:
        """Turn texts into vectors."""
        model = self._known(body.model, EMBEDDINGS)
        texts = body.texts()

        async def one() -> AsyncGenerator[Embedded, None]:
            yield await self.engine.embed(model, texts)

        answering: Answering[Embedded] = Answering(
            one, self.gate, self.limits.seconds, request.receive, self._count_gone
        )
        try:
            (found,) = [item async for item in answering]
        finally:
            await answering.close()
        self.metrics.tokens["prompt"] += found.tokens
        width = len(found.vectors[0])
        if body.dimensions not in (None, width):
            raise _invalid(f"dimensions: this model's vectors have {width} numbers")
        rows = [
            {"object": "embedding", "index": i, "embedding": _encoded(v, body.encoding_format)}
            for i, v in enumerate(found.vectors)
        ]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return JSONResponse({"object": "list", "data": rows, "model": model, "usage": usage})

    async def models(self) -> dict[str, Any]:
        """List the ids that requests may name; an adapter names its base as ``parent``."""
        return {"object": "list", "data": [self._model(s.id, s.parent) for s in self.engine.served]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe one id."""
        served = next((s for s in self.engine.served if s.id == name), None)
        if served is None:
            known = [s.id for s in self.engine.served]
            raise DataError(
                "FG-SERVE-016",
                f"unknown model {_short(repr(name))}",
                allowed=", ".join(known),
                fix=did_you_mean(name, known),
            )
        return self._model(served.id, served.parent)

    def _model(self, name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "finegraft",
            "root": parent or name,
            "parent": parent,
        }

    async def health(self) -> dict[str, Any]:
        """Say that the server answers, and how busy it is."""
        return {"status": "ok", "running": self.gate.inside, "waiting": self.gate.waiting}

    async def prometheus(self) -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(self.metrics.text(self.gate), media_type=metrics.CONTENT_TYPE)

    async def page(self) -> Response:
        """The chat page."""
        text = resources.files("finegraft.serving").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


async def _events(
    reply: replies.Reply, first: Piece, rest: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """Events of a stream; an error in its middle is an event as well."""
    try:
        for chunk in (*reply.first(), *reply.chunks(first)):
            yield replies.event(chunk)
        async for piece in rest:
            for chunk in reply.chunks(piece):
                yield replies.event(chunk)
    except FinegraftError as error:
        yield replies.event(replies.error_body(error))
        return
    except ClientGone:
        return
    yield replies.DONE


def _encoded(vector: list[float], how: str | None) -> list[float] | str:
    if how != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _short(text: str) -> str:
    """Text of a client for a message: printable in UTF-8 and not long."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= 300 else text[:300] + "..."


def _invalid(found: str) -> DataError:
    return DataError(
        "FG-SERVE-015",
        _short(found),
        allowed="the fields that /openapi.json describes",
        fix="correct the fields named above",
    )


def _mistakes(error: RequestValidationError) -> DataError:
    """The first few mistakes of a body, in one line each."""
    lines: list[str] = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"][1:]) or "body"
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 2:
            known = sorted({*Chat.model_fields, *Completion.model_fields})
            lines.append(f"unknown field {_short(repr(place))}, {did_you_mean(place, known)}")
        else:
            lines.append(f"{_short(place)}: {_short(str(item['msg']))}")
    return DataError(
        "FG-SERVE-015",
        "; ".join(dict.fromkeys(lines[:5])),
        allowed="the fields that /openapi.json describes",
        fix="correct the fields named above",
    )


def _handlers(app: FastAPI, service: Service) -> None:
    """Every error in the same shape."""

    async def deliberate(request: Request, error: Any) -> Response:
        return replies.error(error, service.gate.retry_after)

    async def invalid(request: Request, error: Any) -> Response:
        return replies.error(_mistakes(error))

    async def http(request: Request, error: Any) -> Response:
        if isinstance(error.__cause__, FinegraftError):  # raised while the body was read
            return replies.error(error.__cause__)
        problem = DataError(
            "FG-SERVE-015", str(error.detail), fix="see /openapi.json for what each address takes"
        )
        body = replies.error_body(problem)
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=_GONE)

    app.add_exception_handler(FinegraftError, deliberate)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, gone)


def _routes(app: FastAPI, service: Service) -> None:
    get: dict[str, Any] = {"methods": ["GET"], "responses": _PROBLEMS}
    post: dict[str, Any] = {"methods": ["POST"], "responses": _PROBLEMS, "response_model": None}
    app.add_api_route(_PATHS[CHAT], service.chat, **post)
    app.add_api_route(_PATHS[COMPLETIONS], service.completions, **post)
    app.add_api_route(_PATHS[EMBEDDINGS], service.embeddings, **post)
    app.add_api_route("/v1/models", service.models, **get)
    app.add_api_route("/v1/models/{name:path}", service.model, **get)
    app.add_api_route("/health", service.health, **get)
    app.add_api_route("/metrics", service.prometheus, response_class=PlainTextResponse, **get)
    app.add_api_route("/", service.page, methods=["GET"], include_in_schema=False)


class _Counted:
    """Counts answers by endpoint and status, outside of everything else."""

    def __init__(self, app: Any, service: Service, paths: set[str]):
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        path = path if path in self.paths else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests[path, message["status"]] += 1
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s failed", path)
            raise


def build(
    engine: Engine,
    *,
    key: str | None = None,
    host: str = "127.0.0.1",
    limits: Limits = Limits(),
) -> Any:
    """Return the ASGI application of a started engine.

    Args:
        key: What clients must send; None: nothing.
        host: The address that the server is bound to.
        limits: Queue, time and size.
    """
    app = FastAPI(
        title="finegraft",
        version=metadata.version("finegraft"),
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
    )
    service = Service(engine, limits)
    _handlers(app, service)
    _routes(app, service)
    paths = {"/", "/health", "/metrics", "/v1/models", *_PATHS.values()}
    return _Counted(Guard(app, key, limits.most_bytes, host), service, paths)
