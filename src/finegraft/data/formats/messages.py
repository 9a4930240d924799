"""A column ``messages`` with role and content: OpenAI's layout, several turns, system, tools.

A message's ``weight`` of 0 keeps its answer from being learnt, as in OpenAI's fine-tuning files.
"""

from __future__ import annotations

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import messages_of, with_system


def _matches(columns: frozenset[str], row: Row) -> bool:
    return "messages" in columns


def _to_messages(row: Row) -> list[Message]:
    return with_system(row, messages_of("messages", row.get("messages")))


FORMAT = DatasetFormat(
    columns=("messages",),
    matches=_matches,
    to_messages=_to_messages,
    example={
        "messages": [
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "What colour is the sky?"},
            {"role": "assistant", "content": "Blue."},
        ]
    },
    expected=[
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
    ],
)
