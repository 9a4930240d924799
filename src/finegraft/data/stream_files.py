"""What of a file can be read from anywhere, and the reading of it.

What: ``blocks_of`` cuts lines into stretches of bytes and Parquet files into row groups;
``read_lines`` and ``read_group`` give their rows; ``fingerprint`` tells files apart without reading
them. How: a line belongs to the stretch in which it begins. Constraint: a line that is no row is
given as words about it, because a training of days must not end for it. Trade-off: the fingerprint
sees size, time of the last change and a few stretches; a change elsewhere that keeps size and time
is not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finegraft.core.errors import DataError
from finegraft.data import readers
from finegraft.data.stream_remote import Remote

_LINES = (".jsonl", ".ndjson", ".txt")
_GROUP_BYTES = 64 << 20  # larger row groups are read from front to back
_REMOTE_FOOTERS = 32  # Parquet files whose ends are read before training
_MORE_BYTES = 64 << 10
_DOCUMENT_BYTES = 1 << 30
_SPREAD, _STRETCH_BYTES = 16, 64 << 10  # of a fingerprint
_STRETCHED_FILES = 256

Place = Path | Remote


class File(NamedTuple):
    """One file of a specification's part."""

    path: Place
    part: int
    bytes: int

    @classmethod
    def of(cls, path: Place, part: int) -> File:
        """With its size; of a server that does not say, 0."""
        size = path.size if isinstance(path, Remote) else path.stat().st_size
        return cls(path, part, size or 0)


@dataclass(frozen=True)
class Lines:
    """The lines that begin at ``start`` or later, before ``end``."""

    start: int
    end: int

    @property
    def bytes(self) -> int:
        """About as many."""
        return self.end - self.start


@dataclass(frozen=True)
class Group:
    """A row group; ``first`` rows lie before it."""

    number: int
    first: int
    bytes: int


def blocks_of(file: File, size: int, files: int) -> list[Lines] | list[Group] | None:
    """The blocks of a file, or None for one that is read from front to back.

    Args:
        size: Of a block of lines, in bytes.
        files: How many files there are in all.

    Raises:
        DataError: FG-DATA-004, no reader; FG-STREAM-004, a document too large to be read whole.
    """
    path = file.path
    if not readers.readable(path):
        readers.rows_of(path)  # says what is readable
    kind, compressed = readers.suffixes(path)
    if kind in (".json", ".xlsx") and file.bytes > _DOCUMENT_BYTES:
        raise DataError(
            "FG-STREAM-004",
            f"{path} is one document of {file.bytes / 1e9:.1f} GB, which can only be read whole",
            allowed="JSON lines, csv, Parquet or text for as many rows",
            fix="write an object a line: jq -c '.[]' rows.json > rows.jsonl",
        )
    if isinstance(path, Remote) and not path.ranges:
        return None
    if kind in _LINES and not compressed and not _is_wide(path):
        return [Lines(at, min(at + size, file.bytes)) for at in range(0, file.bytes, size)]
    if kind == ".parquet" and (isinstance(path, Path) or files <= _REMOTE_FOOTERS):
        return _groups(path)
    return None


def _is_wide(path: Place) -> bool:
    return stretch(path, 0, 2) in (b"\xff\xfe", b"\xfe\xff")


def _groups(path: Place) -> list[Group] | None:
    from pyarrow import parquet

    with readers.parquet_errors(path), path.open("rb") as handle:
        found = parquet.ParquetFile(handle).metadata
        groups, first = [], 0
        for number in range(found.num_row_groups):
            about = found.row_group(number)
            groups.append(Group(number, first, about.total_byte_size))
            first += about.num_rows
    return None if any(group.bytes > _GROUP_BYTES for group in groups) else groups


def stretch(path: Place, start: int, end: int) -> bytes:
    """The bytes from ``start`` to before ``end``, fewer at the end of the file."""
    if isinstance(path, Remote):
        return path.read(start, end)
    with open(path, "rb") as handle:
        handle.seek(start)
        return handle.read(end - start)


def read_lines(path: Place, block: Lines) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The rows of a block, or words about what is none, each with its place in the file."""
    is_text = readers.suffixes(path)[0] == ".txt"
    begin, found = _whole_lines(path, block)
    for line in found.split(b"\n"):
        place = f"byte {begin:,}"
        begin += len(line) + 1
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield place, f"not UTF-8 ({error.reason})"
            continue
        yield place, {"text": text.rstrip("\r")} if is_text else _json_row(text)


def _json_row(text: str) -> dict[str, Any] | str:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        return f"not JSON ({said}): {readers.excerpt(text)}"
    if isinstance(row, dict):
        return row
    return f"{type(row).__name__} and not an object: {readers.excerpt(text)}"


def _whole_lines(path: Place, block: Lines) -> tuple[int, bytes]:
    """The lines that begin in a block, and the byte at which the first of them begins."""
    first = max(0, block.start - 1)  # the line break before it tells whether a line begins here
    found = stretch(path, first, block.end)
    begin = found.find(b"\n") + 1 if block.start else 0
    if block.start and not begin:
        return block.end, b""
    pieces, more = [found[begin:]], _MORE_BYTES
    at = first + len(found)
    while pieces[-1] and not pieces[-1].endswith(b"\n"):
        tail = stretch(path, at, at + more)
        end = tail.find(b"\n")
        pieces.append(tail if end < 0 else tail[: end + 1])
        at, more = at + len(tail), 2 * more
    lines = b"".join(pieces)
    if not block.start and lines.startswith(b"\xef\xbb\xbf"):
        return 3, lines[3:]
    return first + begin, lines


def read_group(path: Place, block: Group) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The rows of a row group, each with its number in the file."""
    from pyarrow import parquet

    number = block.first
    with readers.parquet_errors(path), path.open("rb") as handle:
        file = parquet.ParquetFile(handle)
        for batch in file.iter_batches(readers.BATCH_ROWS, row_groups=[block.number]):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number:,}", row


def fingerprint(files: list[Place]) -> str:
    """What tells files apart, as hex: sizes, times of the last change, stretches of each.

    Of a file elsewhere it is what its server says that changes with the content. Beyond the first
    256 files no stretches are read.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(files):
        file = File.of(path, 0)
        changed = path.mark() if isinstance(path, Remote) else path.stat().st_mtime_ns
        digest.update(f"{file.bytes} {changed}\n".encode())
        if isinstance(path, Path) and number < _STRETCHED_FILES:
            last = max(0, file.bytes - _STRETCH_BYTES)
            for at in sorted({k * last // (_SPREAD - 1) for k in range(_SPREAD)}):
                digest.update(stretch(path, at, at + _STRETCH_BYTES))
    return digest.hexdigest()
