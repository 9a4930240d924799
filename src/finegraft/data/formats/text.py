"""A column ``text``: raw text, all of it learnt.

Alpaca files carry a ``text`` column beside their own ones, so this layout gives way to the others.
"""

from __future__ import annotations

from finegraft.data.conversation import TEXT_ROLE, DatasetFormat, Message, Row
from finegraft.data.formats._fields import text_of

_OTHERS = frozenset(
    {"completion", "messages", "conversations", "conversation", "output", "response", "answer"}
)


def _matches(columns: frozenset[str], row: Row) -> bool:
    return "text" in columns and not columns & _OTHERS


def _to_messages(row: Row) -> list[Message]:
    return [{"role": TEXT_ROLE, "content": text_of("text", row.get("text"))}]


FORMAT = DatasetFormat(
    columns=("text",),
    matches=_matches,
    to_messages=_to_messages,
    example={"text": "The sky is blue."},
    expected=[{"role": TEXT_ROLE, "content": "The sky is blue."}],
)
