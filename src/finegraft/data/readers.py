"""One reader for each type of file, each giving rows one after another.

What: a table from suffix to a generator of dicts; compressed files are opened by their outer
suffix. How: json and csv from the standard library, parquet, arrow and Zstandard from pyarrow,
spreadsheets from openpyxl. Constraint: whatever is wrong with a file is said with the line it is
on, and nothing but a .json document or a spreadsheet's text table is held in memory whole.
Trade-off: a file that breaks in the middle has given its first rows by then.
"""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from finegraft.core.errors import DataError
from finegraft.data.stream_remote import Remote, failures

Row = dict[str, Any]
Place = Path | Remote  # what has a suffix and can be opened
EXCERPT_CHARS = 60
BATCH_ROWS = 1000  # of parquet and arrow files, read at a time
_MAX_CELL_CHARS = 2**31 - 1


def suffixes(path: Place) -> tuple[str, str]:
    """The suffix that says what is in a file, and the one that says how it is compressed."""
    outer = path.suffix.lower()
    if outer in COMPRESSED:
        return Path(path.stem).suffix.lower(), outer
    return outer, ""


def readable(path: Place) -> bool:
    """Whether there is a reader for files named so."""
    inner, outer = suffixes(path)
    return inner in READERS and (not outer or inner in _TEXT)


def rows_of(path: Place) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        DataError: FG-DATA-003 a line that cannot be read (with its number), FG-DATA-004 a file type
            without a reader.
    """
    if not readable(path):
        inner, outer = suffixes(path)
        known = sorted(_TEXT if outer else READERS)
        raise DataError(
            "FG-DATA-004",
            f"{path} has the file type '{inner + outer or 'none'}'",
            allowed=", ".join(known) + (f" before {outer}" if outer else ""),
            fix="convert it to one of these, or rename it if the content is already one of them",
        )
    return _guarded(path, READERS[suffixes(path)[0]])


def _guarded(path: Place, reader: Callable[[Place], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise unreadable(path, None, f"not UTF-8 ({error.reason})", "save it as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        problem = f"the compressed data is damaged ({excerpt(str(error))})"
        raise unreadable(path, None, problem, "fetch or compress the file again") from error
    except OSError as error:
        problem = error.strerror or excerpt(str(error))
        raise unreadable(path, None, problem, "check that the file is whole") from error
    except failures() as error:  # those of a file elsewhere that are no OSError
        problem = excerpt(str(error) or type(error).__name__)
        raise unreadable(path, None, problem, "check the connection and try again") from error


def unreadable(path: Place, line: int | None, problem: str, fix: str) -> DataError:
    """The error for something in a file that is not a row."""
    where = f"{path}, line {line}" if line else str(path)
    return DataError("FG-DATA-003", f"{where}: {problem}", fix=fix)


def excerpt(text: str) -> str:
    """The beginning of a text, for messages."""
    text = text.strip()
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "..."


def _zstd(source: Any) -> IO[bytes]:
    import pyarrow

    named = str(source) if isinstance(source, Path) else source
    return pyarrow.input_stream(named, compression="zstd")


def _source(path: Place) -> Any:
    """What libraries open: the path of a file here, a handle of one elsewhere."""
    return str(path) if isinstance(path, Path) else path.open("rb")


COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


@contextmanager
def _text(path: Place, newline: str | None = None) -> Iterator[IO[str]]:
    """Open as text: UTF-8, or UTF-16 where the file begins with its mark, as Excel writes it."""
    outer = suffixes(path)[1]

    def opened() -> Any:
        return COMPRESSED[outer](_source(path)) if outer else path.open("rb")

    with opened() as binary:
        start = binary.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with opened() as binary, io.TextIOWrapper(binary, encoding=encoding, newline=newline) as text:
        yield text


def _json_lines(path: Place) -> Iterator[Row]:
    fix = 'write one JSON object a line, for example {"prompt": "...", "completion": "..."}'
    with _text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                column = error.colno if isinstance(error, json.JSONDecodeError) else 1
                problem = f"not JSON ({said} at column {column}): {excerpt(line)}"
                raise unreadable(path, number, problem, fix) from error
            if not isinstance(row, dict):
                problem = f"JSON, but {type(row).__name__} and not an object: {excerpt(line)}"
                raise unreadable(path, number, problem, fix)
            yield row


def _json_document(path: Place) -> Iterator[Row]:
    with _text(path) as handle:
        text = handle.read()
    if not text.strip():
        return
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= text.count("\n") + 1 else ""
        fix = "correct it; if every line is an object of its own, name the file .jsonl"
        problem = f"not JSON ({error.msg}): {excerpt(line)}"
        raise unreadable(path, error.lineno, problem, fix) from error
    if isinstance(found, dict):
        lists = {key: value for key, value in found.items() if isinstance(value, list)}
        if len(lists) != 1:
            problem = f"an object with {len(lists)} lists ({', '.join(lists) or 'none'})"
            raise unreadable(path, None, problem, "keep one list of objects in it")
        found = next(iter(lists.values()))
    if not isinstance(found, list):
        problem = f"{type(found).__name__}, not a list of objects"
        raise unreadable(path, None, problem, "write a list of objects")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            problem = f"item {number} is {type(row).__name__}, not an object: {excerpt(str(row))}"
            raise unreadable(path, None, problem, "write a list of objects")
        yield row


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a cell, which documents exceed."""
    before = csv.field_size_limit(_MAX_CELL_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _separated(delimiter: str) -> Callable[[Place], Iterator[Row]]:
    def read(path: Place) -> Iterator[Row]:
        with _text(path, newline="") as lines:
            used = delimiter
            first = lines.readline()
            if delimiter == "," and "," not in first and ";" in first:
                used = ";"  # what Excel writes where the comma is the decimal mark
            cells = csv.reader(_after(first, lines), delimiter=used, strict=True)
            yield from _table(path, cells, used)

    return read


def _after(first: str, rest: IO[str]) -> Iterator[str]:
    yield first
    yield from rest


def _table(path: Place, cells: Any, delimiter: str) -> Iterator[Row]:
    """Rows of a csv reader, the first one naming the columns."""
    header: list[str] | None = None
    while True:
        try:
            with _long_cells():  # for one row only: the limit belongs to the whole process
                row = next(cells, None)
        except csv.Error as error:
            fix = "close every double quote; write one inside a field twice"
            raise unreadable(path, cells.line_num, str(error), fix) from error
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            _require_distinct(path, header)
            continue
        if len(row) != len(header):
            problem = f"{len(row)} fields, but the header has {len(header)}"
            fix = f"put double quotes around fields that hold {delimiter!r}"
            raise unreadable(path, cells.line_num, problem, fix)
        yield dict(zip(header, row, strict=True))


def _require_distinct(path: Place, header: list[str]) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        problem = f"the header names the column '{twice}' twice"
        raise unreadable(path, 1, problem, "give every column a name of its own")


def _parquet(path: Place) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet_errors(path), parquet.ParquetFile(_source(path)) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()


@contextmanager
def parquet_errors(path: Place) -> Iterator[None]:
    """Say FG-DATA-003 where pyarrow finds that a file is damaged."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        problem = f"not a parquet file ({excerpt(str(error))})"
        raise unreadable(path, None, problem, "write the file again") from error


def _arrow(path: Place) -> Iterator[Row]:
    """Arrow's file format (feather is the same), or its stream, which datasets caches rows in."""
    import pyarrow
    from pyarrow import ipc

    try:
        here = isinstance(path, Path)
        with pyarrow.memory_map(str(path)) if here else path.open("rb") as memory:
            try:
                opened = ipc.open_file(memory)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except pyarrow.ArrowInvalid:
                memory.seek(0)
                batches = iter(ipc.open_stream(memory))
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield from batch.slice(start, BATCH_ROWS).to_pylist()
    except (pyarrow.ArrowException, StopIteration) as error:
        problem = f"not an arrow or feather file ({excerpt(str(error))})"
        raise unreadable(path, None, problem, "write the file again") from error


def _text_lines(path: Place) -> Iterator[Row]:
    with _text(path) as lines:
        for line in lines:
            if line.strip():
                yield {"text": line.rstrip("\n")}


def _spreadsheet(path: Place) -> Iterator[Row]:
    """Rows of the first sheet that has some; the first row names the columns."""
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(_source(path), read_only=True, data_only=True)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError) as error:
        problem = f"not a spreadsheet ({excerpt(str(error))})"
        raise unreadable(path, None, problem, "save it as .xlsx or .csv again") from error
    try:
        for sheet in book.worksheets:
            cells = (
                (number, row)
                for number, row in enumerate(sheet.iter_rows(values_only=True), 1)
                if any(cell is not None for cell in row)
            )
            number, first = next(cells, (0, ()))
            if not first:
                continue
            width = max(i for i, cell in enumerate(first, 1) if cell is not None)
            header = [str(cell) if cell is not None else "" for cell in first[:width]]
            _require_distinct(path, [name for name in header if name])
            for number, row in cells:
                if any(cell is not None for cell in row[width:]):
                    problem = f"a cell to the right of the last column '{header[-1]}'"
                    raise unreadable(path, number, problem, "name the column in the first row")
                values = [*row[:width], *[None] * (width - len(row))]
                yield {
                    name: _cell(value) for name, value in zip(header, values, strict=True) if name
                }
            return
    finally:
        book.close()


def _cell(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return float(value) if isinstance(value, decimal.Decimal) else value


READERS: dict[str, Callable[[Place], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_document,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
    ".xlsx": _spreadsheet,
    ".txt": _text_lines,
}
_TEXT = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"})
