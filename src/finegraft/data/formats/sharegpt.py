"""A column ``conversations`` or ``conversation`` with from and value: ShareGPT's layout.

Role and content inside it are read too, which is what ``standardize_sharegpt`` leaves behind, and
so is a turn of both sides, ``{"human": ..., "assistant": ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import SPEAKERS, malformed, messages_of, with_system


def _matches(columns: frozenset[str], row: Row) -> bool:
    return bool(columns & {"conversations", "conversation"})


def _to_messages(row: Row) -> list[Message]:
    column = "conversations" if "conversations" in row else "conversation"
    value = row.get(column)
    if isinstance(value, list | tuple):
        value = [said for turn in value for said in _speakers(turn)]
    return with_system(row, messages_of(column, value))


def _speakers(turn: object) -> list[object]:
    """One message for each speaker of a turn that names them by its keys."""
    if not isinstance(turn, Mapping) or {"from", "role", "value", "content"} & set(turn):
        return [turn]
    names = [name for name in turn if str(name).lower() in SPEAKERS]
    if not names:
        raise malformed("conversations", f"holds a turn with the keys {', '.join(map(str, turn))}")
    return [{"role": str(name), "content": turn[name]} for name in names if turn[name] is not None]


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
