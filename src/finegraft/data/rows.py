"""From rows to conversations: rename columns, recognise the layout, convert with row numbers.

How: the layout comes from the column names of the first row; the formats are found by file name in
``data/formats``. Constraint: two layouts at once is a question for the user, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finegraft.core.errors import DataError, near
from finegraft.data.conversation import DatasetFormat, Message, Row
from finegraft.data.formats import FORMATS
from finegraft.data.formats._fields import parsed, without_nulls
from finegraft.data.other_tasks import refuse_other_tasks

# Column names that mean the same, most telling first.
_SYNONYMS = {
    "prompt": [
        "question",
        "query",
        "input",
        "inputs",
        "instruction",
        "ask",
        "q",
        "user",
        "human",
        "english",
        "source",
        "src",
        "sentence",
        "request",
        "problem",
        "article",
        "document",
    ],
    "completion": [
        "answer",
        "response",
        "output",
        "outputs",
        "reply",
        "target",
        "a",
        "assistant",
        "translation_extra",
        "translation",
        "chosen",
        "solution",
        "summary",
        "label",
        "bot",
    ],
    "text": ["content", "body", "document", "passage", "story", "article"],
    "messages": ["message", "chat", "dialog", "dialogue", "turns"],
}


def apply_map(rows: Sequence[Row], mapping: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the rows with columns renamed.

    Args:
        rows: The rows as read.
        mapping: New name to old name, ``{"prompt": "question"}``. A column that already had the
            new name is replaced.

    Raises:
        DataError: FG-DATA-006, an old name that the rows do not have.
    """
    if not rows:
        _require_columns([], mapping)
    return list(renamed(rows, mapping))


def renamed(rows: Iterable[Row], mapping: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """``apply_map`` for rows that come one at a time; the first one's columns are checked."""
    taken = set(mapping.values()) | set(mapping)
    for number, row in enumerate(rows):
        if not number:
            _require_columns(list(row), mapping)
        if not mapping:
            yield dict(row)
            continue
        kept = {key: value for key, value in row.items() if key not in taken}
        yield {**{wanted: row.get(old) for wanted, old in mapping.items()}, **kept}


def _require_columns(columns: Sequence[str], mapping: Mapping[str, str]) -> None:
    for wanted, old in mapping.items():
        if old not in columns:
            close = near(old, columns)
            raise DataError(
                "FG-DATA-006",
                f"--map {wanted}={old}: the rows have no column '{old}'",
                allowed=", ".join(columns),
                fix=f"--map {wanted}={close}"
                if close
                else f"--map {wanted}=<one of these columns>",
            )


def detect(rows: Sequence[Row], name: str | None = None) -> tuple[str, DatasetFormat]:
    """Return the name and the format of the rows.

    Args:
        rows: At least one row.
        name: A format to use instead of looking, which must fit the columns.

    Raises:
        DataError: FG-DATA-002 no rows; FG-DATA-007 the columns fit no layout, or two; FG-DATA-034,
            FG-DATA-035 and FG-DATA-037, rows that would lose what they are about.
        ConfigError: FG-CORE-001, no format of that name.
    """
    if not rows:
        raise DataError("FG-DATA-002", "there are no rows", fix="pass at least one row")
    first = rows[0]
    columns = frozenset(first)
    if name is None:
        refuse_other_tasks(rows)
    known = dict(FORMATS.items())
    if name is not None:
        asked = FORMATS.get(name)
        if asked.matches(columns, first):
            return name, asked
        known = {name: asked}
    fitting = [found for found, fmt in known.items() if fmt.matches(columns, first)]
    if len(fitting) == 1:
        return fitting[0], known[fitting[0]]
    listed = ", ".join(str(column) for column in first)
    if fitting:
        raise DataError(
            "FG-DATA-007",
            f"the columns ({listed}) fit more than one layout: {', '.join(fitting)}",
            allowed="columns of one layout",
            fix=f"remove the columns of the other, or name the format: {fitting[0]}",
        )
    raise DataError(
        "FG-DATA-007",
        f"the columns ({listed}) fit no layout",
        allowed="; ".join(f"{found}: {', '.join(f.columns)}" for found, f in known.items()),
        fix=suggest_map(list(first)) or "rename the columns, for example --map text=<column>",
    )


def suggest_map(columns: Sequence[str]) -> str | None:
    """Return a guess like ``--map prompt=question --map completion=answer``, or None."""
    prompt = _guess("prompt", columns)
    completion = _guess("completion", [c for c in columns if c != prompt])
    if prompt and completion:
        pairs = (("prompt", prompt), ("completion", completion))
        return " ".join(f"--map {wanted}={old}" for wanted, old in pairs if wanted != old)
    for wanted in ("messages", "text"):
        found = _guess(wanted, columns)
        if found:
            return f"--map {wanted}={found}"
    if prompt or completion:
        rest = [c for c in columns if c not in (prompt, completion)]
        other = rest[0] if len(rest) == 1 else "<column>"
        return f"--map prompt={prompt or other} --map completion={completion or other}"
    return None


def _guess(wanted: str, columns: Sequence[str]) -> str | None:
    by_lower = {str(column).lower(): str(column) for column in columns}
    names = (wanted, *_SYNONYMS[wanted])
    for name in names:
        if name in by_lower:
            return by_lower[name]
    for name in names:  # misspelt, or with something before or after: my_question, answers
        if len(name) > 2:
            for lower, column in by_lower.items():
                if name in lower.replace("-", "_").split("_") or near(lower, [name]):
                    return column
    return None


def conversations(
    rows: Sequence[Row], fmt: DatasetFormat, names: Sequence[str] | None = None
) -> list[list[Message]]:
    """Return every row as a conversation.

    Args:
        rows: The rows.
        fmt: Their layout.
        names: What messages call each row; None: ``row N``, 1-based.

    Raises:
        DataError: the format's own codes (FG-DATA-005, FG-DATA-012), naming the row.
    """
    out = []
    for place, row in enumerate(rows):
        try:
            out.append(fmt.to_messages(row))
        except DataError as error:
            found = f"{_name(place, names)}: {error.found}"
            raise DataError(error.code, found, allowed=error.allowed, fix=error.fix) from error
    return out


def _name(place: int, names: Sequence[str] | None) -> str:
    return names[place] if names is not None else f"row {place + 1}"


def tools_of(
    rows: Sequence[Row], names: Sequence[str] | None = None
) -> list[list[dict[str, Any]] | None] | None:
    """Return each row's ``tools`` column for ``prepare``, or None when there is no such column.

    Args:
        rows: The rows.
        names: As in ``conversations``.

    Raises:
        DataError: FG-DATA-012, tools that are neither a list nor JSON of one.
    """
    if not any(row.get("tools") for row in rows):
        return None
    out: list[list[dict[str, Any]] | None] = []
    for place, row in enumerate(rows):
        tools = row.get("tools") or None
        if isinstance(tools, str):
            read = parsed(tools)
            tools = [read] if isinstance(read, Mapping) else 0 if read is None else read or None
        if isinstance(tools, list):
            tools = [parsed(tool) if isinstance(tool, str) else tool for tool in tools]
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise DataError(
                "FG-DATA-012",
                f"{_name(place, names)}: the field 'tools' is not a list of JSON schemas",
                allowed="a list of objects, or JSON of one",
                fix="correct 'tools' or remove the column",
            )
        out.append(without_nulls(tools))
    return out
