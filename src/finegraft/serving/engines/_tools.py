"""Tool calls read out of an answer's text.

What: ``parse`` finds calls in the two notations that most chat templates teach: JSON between
``<tool_call>`` tags (Hermes, Qwen) and an answer that is nothing but such JSON (Llama 3).
Constraint: a call names one of the tools that were offered; everything else stays text. Trade-off:
the answer has to be whole, so a stream with tools comes in one piece.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Collection
from typing import Any

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def parse(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and its calls.

    Args:
        text: The whole answer.
        names: Of the tools that were offered.

    Returns:
        What is left of the text, and calls as the API's deltas have them.
    """
    tagged = _TAGGED.findall(text)
    sources = tagged or [text.strip()]
    calls: list[dict[str, Any]] = []
    for source in sources:
        found = _calls(source, names)
        if found is None:
            return text, []
        calls += found
    rest = _TAGGED.sub("", text).strip() if tagged else ""
    return rest, [{**call, "index": index} for index, call in enumerate(calls)]


def _calls(source: str, names: Collection[str]) -> list[dict[str, Any]] | None:
    """Calls in one JSON text, or None where it is not one of calls."""
    try:
        values = json.loads(source)
    except (ValueError, RecursionError):
        return None
    out = []
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, dict) or value.get("name") not in names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        function = {"name": value["name"], "arguments": written}
        out.append(
            {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        )
    return out or None


def spoken(message: dict[str, Any]) -> dict[str, Any]:
    """A message for templates, which take a call's arguments as an object, not as text."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = dict(call["function"])
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message
