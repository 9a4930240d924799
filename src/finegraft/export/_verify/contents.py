"""Which files an export consists of, and whether they are still what was written.

What: ``note`` lists the files of an export in its ``verification.json``; ``refresh`` lists what an
older mark did after a new verification. How: name, bytes and SHA-256 of each. Constraint: what lies
in the folder and was not written by an export is not in the list. Trade-off: hashing takes about a
second for a gigabyte, of an export that took minutes to verify.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finegraft.core.paths import write_whole
from finegraft.export._contract import Written
from finegraft.export._verify import report

CARD = "README.md"
_SMALL_BYTES = 16_000_000


def of(written: Sequence[Written]) -> list[Path]:
    """The files of what one format wrote, the mark and the model card left out."""
    found: list[Path] = []
    for record in written:
        inside = sorted(record.file.rglob("*")) if record.file.is_dir() else [record.file]
        found += [p for p in (*inside, *record.beside) if p.is_file()]
    return [p for p in dict.fromkeys(found) if p.name not in (report.FILE, CARD)]


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def git_digest(file: Path) -> str:
    """What git, and so a hub, calls the bytes of a small file."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def entry(file: Path) -> dict[str, Any]:
    """What the list says of one file; a model card may be edited, so its hash is left out."""
    known: dict[str, Any] = {"bytes": file.stat().st_size}
    return known if file.name == CARD else {**known, "sha256": digest(file)}


def note(folder: Path, files: Iterable[Path]) -> None:
    """Add ``files`` to the list in the mark of ``folder``; names that are gone leave it."""
    mark = folder / report.FILE
    values = report.read(mark)
    listed = {**values.get("contents", {})}
    listed |= {file.relative_to(folder).as_posix(): entry(file) for file in files}
    _write(mark, values, listed)


def refresh(folder: Path, artefact: Path, listed: Mapping[str, Any]) -> None:
    """Put ``listed``, from the mark before, into a new one, for the files as they are now."""
    mark = folder / report.FILE
    found = {}
    for name, before in listed.items():
        file = folder / name
        if file.is_file():
            checked = artefact.is_dir() or file == artefact
            small = file.stat().st_size < _SMALL_BYTES
            found[name] = entry(file) if checked or small else before
    _write(mark, report.read(mark), found)


def _write(mark: Path, values: dict[str, Any], listed: Mapping[str, Any]) -> None:
    there = {name: listed[name] for name in sorted(listed) if (mark.parent / name).is_file()}
    text = json.dumps({**values, "contents": there}, indent=2, ensure_ascii=False)
    write_whole(mark, text + "\n")
