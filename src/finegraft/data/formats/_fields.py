"""What the formats share: reading one field, or one list of messages, and refusing what is empty.

How: every refusal names the field; the caller that knows the row number adds it. Constraint: an
answer that is null or blank is never trained on silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finegraft.core.errors import DataError, near
from finegraft.data.conversation import Message, Row

SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    # An assistant turn whose text is the call itself, as JSON.
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLERS = ("function_call", "tool_call")
_SYSTEM_COLUMNS = ("system", "system_prompt")
# An assistant turn may hold one of these instead of text.
_INSTEAD_OF_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking")


def empty(field: str, value: object) -> DataError:
    """The error for a field that is null or blank."""
    return DataError(
        "FG-DATA-005",
        f"the field '{field}' is {'null' if value is None else 'empty'}",
        allowed="text",
        fix=f"fill in '{field}', or remove the row: finegraft data check DATA --fix clean.jsonl",
    )


def malformed(field: str, problem: str) -> DataError:
    """The error for a field of the wrong shape."""
    return DataError(
        "FG-DATA-012",
        f"the field '{field}' {problem}",
        allowed='text, or a list of {"role": "user", "content": "..."}',
        fix=f"correct '{field}' or remove the row; finegraft data check DATA lists all such rows",
    )


def text_of(field: str, value: object) -> str:
    """Return ``value`` as text that is not blank; numbers are written out.

    Raises:
        DataError: FG-DATA-005 null or blank, FG-DATA-012 neither text nor a number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise empty(field, value)
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise malformed(field, f"is {type(value).__name__}, not text")
    return value


def _content(field: str, value: object) -> str | None:
    """Message content as text; lists of text parts are joined."""
    if isinstance(value, list):
        parts = [_part_of(part) for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise malformed(field, "holds a part that is not text")
        return "".join(str(part) for part in parts)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise malformed(field, f"is {type(value).__name__}, not text")


def _part_of(part: object) -> object:
    """The text of one part of a message; LLaMA-Factory calls it value."""
    if not isinstance(part, Mapping):
        return part
    return part.get("text", part.get("value") if part.get("type") == "text" else None)


def message_of(field: str, value: object) -> Message:
    """Return one message with ``role`` and ``content``, other keys kept.

    Args:
        field: How messages to people name it, ``messages[2]`` say.
        value: A mapping with role/content or from/value.

    Raises:
        DataError: FG-DATA-005 an empty answer, FG-DATA-012 no message.
    """
    if not isinstance(value, Mapping):
        raise malformed(field, f"is {type(value).__name__}, not a message")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    speaker = value.get(role_key)
    if not isinstance(speaker, str):
        raise malformed(f"{field}.{role_key}", "is missing")
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        close = near(speaker.lower(), SPEAKERS)
        hint = f" (did you mean '{close}'?)" if close else ""
        raise malformed(f"{field}.{role_key}", f"is '{speaker}'{hint}, not a known role")
    content = _content(f"{field}.{content_key}", value.get(content_key))
    # Parquet and datasets fill absent keys with null: those were never there.
    message: Message = {"role": role}
    if content is not None:
        message["content"] = content
    for key, item in value.items():
        if key not in (role_key, content_key) and item is not None:
            message["weight" if key == "loss_weight" else key] = item
    if speaker.lower() in _CALLERS and (calls := _calls_in(content)):
        return {"role": role, "tool_calls": calls}
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(f"{field}.tool_calls", message["tool_calls"])
    if role == "assistant" and any(message.get(key) for key in _INSTEAD_OF_TEXT):
        return message
    if content is None or (role == "assistant" and not content.strip()):
        raise empty(f"{field}.{content_key}", content)
    return message


def messages_of(field: str, value: object) -> list[Message]:
    """Return a list of messages.

    Raises:
        DataError: FG-DATA-005 null, empty or with an empty answer, FG-DATA-012 no list of messages.
    """
    if value is None or value == []:
        raise empty(field, value)
    if not isinstance(value, (list, tuple)):
        raise malformed(field, f"is {type(value).__name__}, not a list of messages")
    return [message_of(f"{field}[{number}]", item) for number, item in enumerate(value)]


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Put the text of a column ``system`` (or ``system_prompt``) in front of a conversation.

    A conversation that begins with a system message keeps its own.
    """
    texts = [row[name] for name in _SYSTEM_COLUMNS if isinstance(row.get(name), str)]
    text = next((text for text in texts if text.strip()), None)
    if text is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def without_nulls(value: Any) -> Any:
    """The value without keys that are null.

    Parquet gives every object of a column the keys of all of them, so the arguments of one call
    would carry those of every other tool.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def parsed(text: str) -> Any:
    """JSON as a value, None where it is no JSON."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _calls_in(content: str | None) -> list[dict[str, Any]]:
    """Calls of a turn that says ``{"name": ..., "arguments": ...}``, or a list of these."""
    found = parsed(content or "")
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(
        isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls
    ):
        return []
    return [_call("tool_calls", {"function": call}) for call in calls]


def _calls(field: str, value: Any) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them; JSON, here or in the arguments, is read.

    Raises:
        DataError: FG-DATA-012, no list of calls.
    """
    calls = parsed(value) if isinstance(value, str) else value
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise malformed(field, "is not a list of tool calls")
    return [_call(f"{field}[{place}]", call) for place, call in enumerate(calls)]


def _call(field: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise malformed(field, "has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        read = parsed(arguments) if arguments.strip() else {}
        if not isinstance(read, Mapping):
            raise malformed(f"{field}.arguments", "is text that is not a JSON object")
        arguments = read
    rest = {key: call[key] for key in call if key in ("id", "type") and call[key] is not None}
    named = {"name": function["name"], "arguments": without_nulls(arguments or {})}
    return {"type": "function", **rest, "function": named}
