"""Columns ``question`` and ``answer`` (or ``response``), perhaps with a ``context`` to use.

The context comes first and the question after an empty line, so that the question stands next to
its answer.
"""

from __future__ import annotations

from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats._fields import text_of, with_system

_OTHERS = frozenset({"messages", "conversations", "conversation", "instruction"})


def _matches(columns: frozenset[str], row: Row) -> bool:
    pair = {"prompt", "completion"} <= columns
    answers = columns & {"answer", "response"}
    return "question" in columns and bool(answers) and not pair and not columns & _OTHERS


def _to_messages(row: Row) -> list[Message]:
    question = text_of("question", row.get("question"))
    context = row.get("context")
    if context is not None and str(context).strip():
        question = text_of("context", context) + "\n\n" + question
    answer = "answer" if "answer" in row else "response"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_of(answer, row.get(answer))},
    ]
    return with_system(row, messages)


FORMAT = DatasetFormat(
    columns=("question", "answer"),
    matches=_matches,
    to_messages=_to_messages,
    example={"context": "The sky is blue.", "question": "Which colour is it?", "answer": "Blue."},
    expected=[
        {"role": "user", "content": "The sky is blue.\n\nWhich colour is it?"},
        {"role": "assistant", "content": "Blue."},
    ],
)
