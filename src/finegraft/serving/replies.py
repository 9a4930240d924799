"""What clients read: errors, answers, chunks.

What: OpenAI-shaped objects made from ``Piece`` objects. How: one ``Reply`` per request knows its id
and endpoint and gives either chunks or, from all pieces together, the whole object. Constraint:
chunks joined are the whole object; numbers that JSON cannot hold do not occur.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from finegraft.core.errors import FinegraftError
from finegraft.serving.engines import Piece, Token

DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # what the API gives for a share of nothing

# HTTP status and OpenAI's ``type`` by error code; every other deliberate error is 400.
_STATUS = {
    "FG-SERVE-010": (429, "rate_limit_error"),
    "FG-SERVE-011": (421, "invalid_request_error"),
    "FG-SERVE-012": (401, "authentication_error"),
    "FG-SERVE-013": (413, "invalid_request_error"),
    "FG-SERVE-014": (415, "invalid_request_error"),
    "FG-SERVE-016": (404, "not_found_error"),
    "FG-SERVE-017": (408, "timeout_error"),
    "FG-SERVE-023": (503, "server_error"),
    "FG-SERVE-024": (503, "server_error"),
}


class Problem(BaseModel):
    """What stands under ``error``."""

    message: str
    type: str
    param: str | None
    code: str | None


class ProblemBody(BaseModel):
    """Body of every answer that is not 2xx."""

    error: Problem


def error_body(error: FinegraftError, param: str | None = None) -> dict[str, Any]:
    """The object that stands under ``error``, with our code and what to do."""
    _, kind = _STATUS.get(error.code, (400, "invalid_request_error"))
    message = f"{error.code}: {error.found}"
    message += f" (allowed: {error.allowed})" if error.allowed else ""
    message += f"; fix: {error.fix}" if error.fix else ""
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def error(found: FinegraftError, retry_after: int | None = None) -> JSONResponse:
    """An error as a response; a second one in the header where trying again helps."""
    status, _ = _STATUS.get(found.code, (400, ""))
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if retry_after is not None and status == 429:
        headers["Retry-After"] = str(retry_after)
    if status == 413:
        headers["Connection"] = "close"  # the rest of the body is never read
    return JSONResponse(error_body(found), status, headers)


def event(values: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST


def _chat_token(token: Token) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.bytes),
    }


def _chat_shares(tokens: Iterable[Token]) -> dict[str, Any]:
    content = [
        {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _shares(tokens: Iterable[Token], offset: int) -> dict[str, Any]:
    """The older shape, of ``/v1/completions``."""
    out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    out["text_offset"] = []
    for token in tokens:
        out["tokens"].append(token.text)
        out["token_logprobs"].append(_finite(token.logprob))
        out["top_logprobs"].append({other.text: _finite(other.logprob) for other in token.top})
        out["text_offset"].append(offset)
        offset += len(token.text)
    return out


class Reply:
    """One request's answer in the API's words.

    Args:
        chat: Of ``/v1/chat/completions`` or of ``/v1/completions``.
        model: The id that the client used.
        shares: Whether log-probabilities were asked for.
        usage: Whether a stream ends with token counts.
    """

    def __init__(self, chat: bool, model: str, shares: bool, usage: bool):
        self.chat, self.model, self.shares, self.usage = chat, model, shares, usage
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._offset = 0

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk" if self.chat else "text_completion", choices)
        if self.usage:
            chunk["usage"] = None
        return chunk

    def first(self) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What one piece adds."""
        out = []
        if piece.text or piece.reasoning or piece.tokens or piece.tool_calls:
            out.append(self._chunk([self._choice(piece)]))
        if piece.reason is not None:
            end: dict[str, Any] = {"index": 0, "finish_reason": piece.reason, "logprobs": None}
            end.update({"delta": {}} if self.chat else {"text": ""})
            out.append(self._chunk([end]))
            if self.usage:
                out.append({**self._chunk([]), "usage": _usage(piece)})
        return out

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": None}
        if not self.chat:
            choice["text"] = piece.text
            if self.shares:
                choice["logprobs"] = _shares(piece.tokens, self._offset)
                self._offset += sum(len(token.text) for token in piece.tokens)
            return choice
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.tool_calls:
            delta["tool_calls"] = list(piece.tool_calls)
        if self.shares:
            choice["logprobs"] = _chat_shares(piece.tokens)
        return {**choice, "delta": delta}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The object of all pieces together."""
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice: dict[str, Any] = {"index": 0, "finish_reason": pieces[-1].reason, "logprobs": None}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            reasoning = "".join(piece.reasoning for piece in pieces)
            if reasoning:
                message["reasoning_content"] = reasoning
            calls = _joined_calls(pieces)
            if calls:
                message["tool_calls"] = calls
                message["content"] = text or None
            choice["message"] = message
            choice["logprobs"] = _chat_shares(tokens) if self.shares else None
        else:
            choice["text"] = text
            choice["logprobs"] = _shares(tokens, 0) if self.shares else None
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._object(kind, [choice]), "usage": _usage(pieces[-1])}


def _usage(last: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def _joined_calls(pieces: list[Piece]) -> list[dict[str, Any]]:
    """Tool calls put together from their deltas, which name their place by ``index``."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in (call for piece in pieces for call in piece.tool_calls):
        call = calls.setdefault(
            delta.get("index", 0),
            {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
        )
        call["id"] = delta.get("id") or call["id"]
        for part in ("name", "arguments"):
            call["function"][part] += (delta.get("function") or {}).get(part) or ""
    return [calls[index] for index in sorted(calls)]
