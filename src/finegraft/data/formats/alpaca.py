"""Columns ``instruction``, ``output`` and perhaps ``input``: Stanford Alpaca's layout."""

from __future__ import annotations

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import text_of


def _matches(columns: frozenset[str], row: Row) -> bool:
    return {"instruction", "output"} <= columns


def _to_messages(row: Row) -> list[Message]:
    prompt = text_of("instruction", row.get("instruction"))
    extra = row.get("input")
    if extra is not None and str(extra).strip():
        prompt += "\n\n" + text_of("input", extra)
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": text_of("output", row.get("output"))},
    ]


FORMAT = DatasetFormat(
    columns=("instruction", "output"),
    matches=_matches,
    to_messages=_to_messages,
    example={"instruction": "Translate to French.", "input": "Good day", "output": "Bonjour"},
    expected=[
        {"role": "user", "content": "Translate to French.\n\nGood day"},
        {"role": "assistant", "content": "Bonjour"},
    ],
)
