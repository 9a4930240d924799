"""Files of rows, read whole.

What: one function from a path to a list of dicts, for the six file types that people have rows in.
How: a table from suffix to reader; json and csv from the standard library, parquet from pyarrow.
Constraint: whatever is wrong with a file is said with the line it is on. Trade-off: everything is
read into memory, which a fine-tuning set on one machine fits into; there is no streaming.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finegraft.core.errors import DataError, near

EXCERPT_CHARS = 60
_MAX_CELL_CHARS = 2**31 - 1


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read every row of a file.

    Args:
        path: A .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt file. Text files give one row
            ``{"text": ...}`` for each line that is not empty.

    Returns:
        One dict per row, in the order of the file.

    Raises:
        DataError: FG-DATA-001 no such file, FG-DATA-002 no rows in it, FG-DATA-003 a line that
            cannot be read (with its number), FG-DATA-004 a file type without a reader.
    """
    path = Path(path)
    _require_file(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            "FG-DATA-004",
            f"{path} has the file type '{path.suffix or 'none'}'",
            allowed=", ".join(sorted(_READERS)),
            fix="convert it to one of these, or rename it if the content is already one of them",
        )
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise _unreadable(path, None, f"not UTF-8 ({error.reason})", "save it as UTF-8") from error
    if not rows:
        raise DataError(
            "FG-DATA-002", f"{path} holds no rows", fix="write at least one row into it"
        )
    return rows


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as hex, read in pieces.

    Raises:
        DataError: FG-DATA-001, no such file.
    """
    path = Path(path)
    _require_file(path)
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _require_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise DataError("FG-DATA-001", f"{path} is a folder", fix="pass the path of one file in it")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = near(path.name, beside)
    readable = sorted(name for name in beside if Path(name).suffix.lower() in _READERS)[:10]
    raise DataError(
        "FG-DATA-001",
        f"there is no file {path}",
        allowed=", ".join(readable) or None,
        fix=f"did you mean {path.parent / close}?" if close else "check the path of the data file",
    )


def _unreadable(path: Path, line: int | None, problem: str, fix: str) -> DataError:
    where = f"{path}, line {line}" if line else str(path)
    return DataError("FG-DATA-003", f"{where}: {problem}", fix=fix)


def _excerpt(text: str) -> str:
    text = text.strip()
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "..."


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    fix = 'write one JSON object a line, for example {"prompt": "...", "completion": "..."}'
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"not JSON ({error.msg} at column {error.colno}): {_excerpt(line)}"
                raise _unreadable(path, number, problem, fix) from error
            if not isinstance(row, dict):
                problem = f"JSON, but {type(row).__name__} and not an object: {_excerpt(line)}"
                raise _unreadable(path, number, problem, fix)
            rows.append(row)
    return rows


def _json_document(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= text.count("\n") + 1 else ""
        fix = "correct it; if every line is an object of its own, name the file .jsonl"
        problem = f"not JSON ({error.msg}): {_excerpt(line)}"
        raise _unreadable(path, error.lineno, problem, fix) from error
    if isinstance(found, dict):
        lists = {key: value for key, value in found.items() if isinstance(value, list)}
        if len(lists) != 1:
            problem = f"an object with {len(lists)} lists ({', '.join(lists) or 'none'})"
            raise _unreadable(path, None, problem, "keep one list of objects in it")
        found = next(iter(lists.values()))
    if not isinstance(found, list):
        problem = f"{type(found).__name__}, not a list of objects"
        raise _unreadable(path, None, problem, "write a list of objects")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            problem = f"item {number} is {type(row).__name__}, not an object: {_excerpt(str(row))}"
            raise _unreadable(path, None, problem, "write a list of objects")
    return found


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a cell, which documents exceed."""
    before = csv.field_size_limit(_MAX_CELL_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _separated(delimiter: str) -> Callable[[Path], list[dict[str, Any]]]:
    def read(path: Path) -> list[dict[str, Any]]:
        rows = []
        with open(path, encoding="utf-8-sig", newline="") as lines, _long_cells():
            cells = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                header = next(cells, [])
                for row in cells:
                    if not row:
                        continue
                    if len(row) != len(header):
                        problem = f"{len(row)} fields, but the header has {len(header)}"
                        fix = f"put double quotes around fields that hold {delimiter!r}"
                        raise _unreadable(path, cells.line_num, problem, fix)
                    rows.append(dict(zip(header, row, strict=True)))
            except csv.Error as error:
                fix = "close every double quote; write one inside a field twice"
                raise _unreadable(path, cells.line_num, str(error), fix) from error
        return rows

    return read


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        problem = f"not a parquet file ({_excerpt(str(error))})"
        raise _unreadable(path, None, problem, "write the file again") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _text_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as lines:
        return [{"text": line.rstrip("\n")} for line in lines if line.strip()]


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_document,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _text_lines,
}
