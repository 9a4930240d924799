"""A column ``conversations`` or ``conversation`` with from and value: ShareGPT's layout.

Role and content inside it are read too, which is what ``standardize_sharegpt`` leaves behind.
"""

from __future__ import annotations

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import messages_of


def _matches(columns: frozenset[str], row: Row) -> bool:
    return bool(columns & {"conversations", "conversation"})


def _to_messages(row: Row) -> list[Message]:
    column = "conversations" if "conversations" in row else "conversation"
    return messages_of(column, row.get(column))


FORMAT = DatasetFormat(
    columns=("conversations",),
    matches=_matches,
    to_messages=_to_messages,
    example={
        "conversations": [
            {"from": "system", "value": "You are terse."},
            {"from": "human", "value": "What colour is the sky?"},
            {"from": "gpt", "value": "Blue."},
        ]
    },
    expected=[
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
    ],
)
