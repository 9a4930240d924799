"""Columns ``instruction``, ``output`` and perhaps ``input``: Stanford Alpaca's layout.

Dolly's names (``context``, ``response``) are read as well, and what LLaMA-Factory adds: ``system``,
and earlier turns in ``history`` as pairs of question and answer.
"""

from __future__ import annotations

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import malformed, text_of, with_system


def _matches(columns: frozenset[str], row: Row) -> bool:
    return "instruction" in columns and bool(columns & {"output", "response"})


def _history(value: object) -> list[Message]:
    if not value:
        return []
    messages: list[Message] = []
    if not isinstance(value, list | tuple):
        raise malformed("history", f"is {type(value).__name__}, not a list of pairs")
    for number, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise malformed(f"history[{number}]", "is not a pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text_of(f"history[{number}]", text)})
    return messages


def _to_messages(row: Row) -> list[Message]:
    prompt = text_of("instruction", row.get("instruction"))
    for field in ("input", "context"):
        extra = row.get(field)
        if extra is not None and str(extra).strip():
            prompt += "\n\n" + text_of(field, extra)
    answer = "output" if "output" in row else "response"
    messages = [
        *_history(row.get("history")),
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": text_of(answer, row.get(answer))},
    ]
    return with_system(row, messages)


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
