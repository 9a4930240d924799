"""Rows from standard input, kept as a file.

What: ``saved`` copies what comes in to a file of the cache and returns its path. How: the first
character tells JSON lines from a JSON list; the name is the content's SHA-256, so the same input is
kept once. Constraint: a run reads its rows again when it goes on, and standard input is gone by
then. Trade-off: the copy stays on the disk until the cache folder is cleaned.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from finegraft.core.errors import DataError
from finegraft.core.paths import cache_dir, storage_error

NAME = "-"
_PIECE_BYTES = 1 << 20
_TYPES = {b"{": ".jsonl", b"[": ".json"}


@functools.cache
def saved() -> Path:
    """Return the file that holds standard input, which is read on the first call.

    Raises:
        DataError: FG-DATA-033, a terminal, nothing, or something that is not JSON.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise _cannot("standard input is a terminal", "cat rows.jsonl | finegraft train --data -")
    folder = cache_dir() / "stdin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".partial")
        try:
            return _copied(handle, Path(name))
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise storage_error(error, folder) from error


def _copied(handle: int, partial: Path) -> Path:
    digest, start = hashlib.sha256(), b""
    with os.fdopen(handle, "wb") as out:
        while piece := sys.stdin.buffer.read(_PIECE_BYTES):
            start = start or piece.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            digest.update(piece)
            out.write(piece)
    if start not in _TYPES:
        problem = f"begins with {start.decode('utf-8', 'replace')!r}" if start else "is empty"
        fix = "write other types to a file whose ending says what it is, .csv say"
        raise _cannot(f"standard input {problem}", fix)
    path = partial.with_name(digest.hexdigest()[:32] + _TYPES[start])
    partial.replace(path)
    return path


def _cannot(found: str, fix: str) -> DataError:
    return DataError("FG-DATA-033", found, allowed="JSON lines, or one JSON list", fix=fix)
