"""What the formats share: reading one field, or one list of messages, and refusing what is empty.

How: every refusal names the field; the caller that knows the row number adds it. Constraint: an
answer that is null or blank is never trained on silently.
"""

from __future__ import annotations

from collections.abc import Mapping

from finegraft.core.errors import DataError, near
from finegraft.data.conversation import Message

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
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
# An assistant turn may hold one of these instead of text.
_INSTEAD_OF_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking")


def empty(field: str, value: object) -> DataError:
    """The error for a field that is null or blank."""
    return DataError(
        "FG-DATA-005",
        f"the field '{field}' is {'null' if value is None else 'empty'}",
        allowed="text",
        fix=f"fill in '{field}' or remove the row",
    )


def malformed(field: str, problem: str) -> DataError:
    """The error for a field of the wrong shape."""
    return DataError(
        "FG-DATA-012",
        f"the field '{field}' {problem}",
        allowed='text, or a list of {"role": "user", "content": "..."}',
        fix=f"correct '{field}' or remove the row",
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
        parts = [p.get("text") if isinstance(p, Mapping) else p for p in value]
        if not all(isinstance(part, str) for part in parts):
            raise malformed(field, "holds a part that is not text")
        return "".join(str(part) for part in parts)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise malformed(field, f"is {type(value).__name__}, not text")


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
            message[key] = item
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
