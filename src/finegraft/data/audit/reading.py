"""Rows for the audit: as training reads them, but past lines that cannot be read.

What: ``rows_of`` yields numbered rows from a specification or from a list; ``layout_of`` finds what
they are. How: ``sources.iter_rows`` for every kind of file except JSON lines, which are read here
because a bad line is a finding and not the end. Constraint: a row's number is its place among the
lines that are not empty, so that in a file without empty lines it is the number of the line.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.errors import DataError
from finegraft.data import labels, readers, sources
from finegraft.data.audit.checks import structure
from finegraft.data.conversation import DatasetFormat
from finegraft.data.formats import FORMATS
from finegraft.data.rows import detect, renamed

_LINES = (".jsonl", ".ndjson")
_LOOKED_AT = 200  # rows that decide the layout
_EXCERPT_CHARS = 60


class Bad(dict[str, Any]):
    """In place of a row: a line that is no row.

    Attributes:
        code: Of the check.
        line: The line as it stands.
        says: What is wrong with it.
    """

    def __init__(self, code: str, line: str, says: str):
        super().__init__()
        self.code, self.line, self.says = code, line, says


Source = Any  # a specification of ``sources``, or a list of rows


def rows_of(source: Source, mapping: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Yield every row, dicts and ``Bad`` lines.

    Args:
        source: As ``sources.iter_rows`` takes it, or a sequence of dicts.
        mapping: Columns to rename, wanted to found.

    Raises:
        DataError: as ``sources.iter_rows``, but not for single lines of JSON.
    """
    found = iter(source) if is_rows(source) else _from(source)
    if not mapping:
        yield from found
        return
    for row in found:
        if isinstance(row, Bad):
            yield row
        else:
            taken = {*mapping, *mapping.values()}
            kept = {key: value for key, value in row.items() if key not in taken}
            new = {wanted: row[old] for wanted, old in mapping.items() if old in row}
            yield {**new, **kept}


def is_rows(source: Source) -> bool:
    """Whether a source is rows already and not the name of a file."""
    return (
        isinstance(source, Sequence)
        and not isinstance(source, str)
        and bool(source)
        and isinstance(source[0], Mapping)
        and "path" not in source[0]
    )


def _from(spec: Any) -> Iterator[Any]:
    for part in sources.parts(sources.absolute(spec)):
        path = Path(part.path)
        if path.is_file() and readers.suffixes(path)[0] in _LINES:
            lines = _json_lines(path)
            yield from renamed_lines(lines, part.map) if part.map else lines
        else:
            yield from sources.iter_rows({"path": part.path, "map": part.map})


def renamed_lines(lines: Iterator[Any], mapping: Mapping[str, str]) -> Iterator[Any]:
    """``rows.renamed`` that lets bad lines through."""
    for row in lines:
        yield row if isinstance(row, Bad) else next(iter(renamed(iter([row]), mapping)))


def _json_lines(path: Path) -> Iterator[Any]:
    outer = readers.suffixes(path)[1]
    loads = json.loads
    with readers.COMPRESSED[outer](path) if outer else open(path, "rb") as binary:
        start = binary.read(2)
        wide = start in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if wide else "utf-8-sig"
    with (
        readers.COMPRESSED[outer](path) if outer else open(path, "rb") as binary,
        io.TextIOWrapper(binary, encoding=encoding, errors="surrogateescape") as lines,
    ):
        for line in lines:
            if not line.strip():
                continue
            try:
                row = loads(line := line.rstrip())
            except (json.JSONDecodeError, RecursionError) as error:
                yield Bad(structure.UNREADABLE, line, f"{_what(error)}: {excerpt(line)}")
                continue
            if isinstance(row, dict):
                yield row
            else:
                says = f"{type(row).__name__} and not an object: {excerpt(line)}"
                yield Bad(structure.NOT_OBJECT, line, says)


def _what(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply"


def excerpt(text: str, around: int = 0) -> str:
    """At most 60 characters of a text, on one line, beginning a little before ``around``."""
    start = max(0, around - 15)
    piece = " ".join(text[start : start + _EXCERPT_CHARS].split())
    before, after = "..." * (start > 0), "..." * (len(text) > start + _EXCERPT_CHARS)
    return f"{before}{piece}{after}"


@dataclass(frozen=True)
class Layout:
    """What rows are.

    Attributes:
        name: Of the format, or ``classification``.
        format: None for classification.
        columns: Of text, label and pair, for classification.
        several: The source has several parts, which may have layouts of their own.
    """

    name: str
    format: DatasetFormat | None
    columns: labels.Columns | None = None
    several: bool = False


_LABEL_NAMES = ("label", "labels", "sentiment", "category", "class", "intent", "topic", "emotion")


def layout_of(
    source: Source,
    mapping: Mapping[str, str] | None = None,
    task: str | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Layout:
    """Find what the rows are from the first 200, most of which decide.

    Args:
        task: ``causal`` or ``classification``; None: classification where a text column stands
            beside a column named like a label.
        columns: ``text``, ``pair`` and ``label`` of classification, where they are known.

    Raises:
        DataError: FG-DATA-002 no rows, FG-DATA-007 the columns fit no layout, FG-CLASS-002 and
            FG-CLASS-003 for classification.
    """
    first = list(itertools.islice(rows_of(source, mapping), _LOOKED_AT))
    good = [row for row in first if not isinstance(row, Bad)]
    if not good:
        raise DataError(
            "FG-DATA-002",
            f"none of the first {len(first)} lines is a row" if first else "there are no rows",
            allowed='an object a line, {"prompt": "...", "completion": "..."} say',
            fix="write the file as JSON lines, or name it by its type",
        )
    shapes = Counter(tuple(map(str, row)) for row in good)
    usual = next(row for row in good if tuple(map(str, row)) == shapes.most_common(1)[0][0])
    if task == "classification" or (task is None and _has_label(usual)):
        which = labels.columns([usual], **(columns or {}))
        return Layout("classification", None, which)
    name, found = detect([usual])
    several = not is_rows(source) and len(sources.parts(source)) > 1
    return Layout(name, found, several=several)


@functools.cache
def _formats() -> dict[str, DatasetFormat]:
    return dict(FORMATS.items())


def fitting(row: Mapping[str, Any]) -> dict[str, DatasetFormat]:
    """The formats whose columns a row has."""
    columns = frozenset(map(str, row))
    return {name: fmt for name, fmt in _formats().items() if fmt.matches(columns, row)}


def _has_label(row: Mapping[str, Any]) -> bool:
    names = [str(name).lower() for name in row]
    fits = fitting(row)
    if set(fits) - {"text"} or not any(name in _LABEL_NAMES for name in names):
        return False
    return len(names) > 1
