"""Columns ``prompt`` and ``completion``: text, a message, or lists of these, as trl reads them.

Only the completion is learnt: answers inside a prompt that is a list get the weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import messages_of, text_of, with_system


def _matches(columns: frozenset[str], row: Row) -> bool:
    return {"prompt", "completion"} <= columns


def _side(field: str, value: object, role: str) -> list[Message]:
    if isinstance(value, Mapping) and {"role", "from"} & set(value):
        value = [value]
    if isinstance(value, list | tuple):
        return messages_of(field, value)
    return [{"role": role, "content": text_of(field, value)}]


def _to_messages(row: Row) -> list[Message]:
    prompt = _side("prompt", row.get("prompt"), "user")
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0
    completion = _side("completion", row.get("completion"), "assistant")
    return with_system(row, prompt + completion)


FORMAT = DatasetFormat(
    columns=("prompt", "completion"),
    matches=_matches,
    to_messages=_to_messages,
    example={"prompt": "The sky is", "completion": "blue."},
    expected=[
        {"role": "user", "content": "The sky is"},
        {"role": "assistant", "content": "blue."},
    ],
)
