"""What the page reads: JSON that every browser parses, errors in one shape, server-sent events.

What: ``reply`` for values, ``error`` for a ``FinegraftError``, ``event`` for one part of a stream.
How: a status for the codes of this part, 422 for every other deliberate error. Constraint: JSON has
no NaN, and a loss can be one, so what is not finite becomes null. Trade-off: values are copied once
for that.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from starlette.responses import Response

from finegraft.core.errors import FinegraftError
from finegraft.core.schema import TrainConfig

# HTTP status by code; every other deliberate error is 422: understood, and not possible.
_STATUS = {
    "FG-UI-001": 401,
    "FG-UI-002": 421,
    "FG-UI-003": 403,
    "FG-UI-004": 401,
    "FG-UI-005": 403,
    "FG-UI-006": 413,
    "FG-UI-007": 415,
    "FG-UI-009": 400,
    "FG-UI-010": 404,
    "FG-UI-011": 404,
    "FG-UI-012": 400,
    "FG-UI-013": 409,
    "FG-UI-014": 409,
    "FG-UI-015": 404,
    "FG-UI-016": 409,
    "FG-UI-017": 409,
    "FG-UI-018": 404,
    "FG-UI-019": 409,
    "FG-UI-020": 404,
    "FG-UI-021": 409,
    "FG-UI-023": 408,
    "FG-RUN-020": 404,
    "FG-DATA-001": 404,
}
_QUOTED = re.compile(r"'(\w+)'")


def plain(value: Any) -> Any:
    """The value as JSON has it: paths as text, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def text(values: Any) -> bytes:
    """JSON as bytes; lone surrogates, which UTF-8 cannot hold, become question marks."""
    words = json.dumps(plain(values), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return words.encode("utf-8", "replace")


def reply(values: Any, status: int = 200) -> Response:
    """Values as a response."""
    return Response(text(values), status, media_type="application/json")


def status_of(found: FinegraftError) -> int:
    """The HTTP status of an error."""
    return _STATUS.get(found.code, 422)


def error_values(found: FinegraftError) -> dict[str, Any]:
    """An error as the page shows it; ``problems`` name the settings that it is about."""
    values: dict[str, Any] = {
        "code": found.code,
        "message": found.found,
        "allowed": found.allowed,
        "fix": found.fix,
    }
    problems = problems_of(found)
    keys = [one["key"] for one in problems if one["key"]]
    if not keys:
        return values
    return {**values, "key": keys[0] if len(keys) == 1 else None, "problems": problems}


def problems_of(found: FinegraftError) -> list[dict[str, Any]]:
    """What an error says about settings, one entry for each of its sentences."""
    if found.code == "FG-CONF-001":
        lines = found.found.removeprefix("the form: ").split("; ")
        return [{"key": _key_in(line), "message": line} for line in lines]
    return [{"key": _key_of(found), "message": found.found}]


def _key_in(line: str) -> str | None:
    """The first setting that stands in quotes; of an unknown one the name that was sent."""
    quoted = _QUOTED.findall(line)
    return quoted[0] if quoted else None


def _key_of(found: FinegraftError) -> str | None:
    part = found.code.split("-")[1]
    if part in ("CONF", "ADAPT", "PLAN", "CLASS"):
        words = re.findall(r"\w+", found.found)
        return next((name for name in words if name in TrainConfig.model_fields), None)
    return {"DATA": "data", "MODEL": "model"}.get(part)


def error(found: FinegraftError) -> Response:
    """An error as a response."""
    status = status_of(found)
    made = reply({"error": error_values(found)}, status)
    if status in (408, 413):
        made.headers["Connection"] = "close"  # the rest of the body is never read
    return made


def event(kind: str, values: Any, place: int | None = None) -> bytes:
    """One server-sent event; ``place`` is what a browser sends when it connects again."""
    mark = b"" if place is None else b"id: %d\n" % place
    return b"event: " + kind.encode() + b"\n" + mark + b"data: " + text(values) + b"\n\n"


BEAT = b":\n\n"  # a comment, which keeps a connection open
