"""Where rows come from: files, patterns, standard input, the hub, or several of these.

What: ``iter_rows`` from a specification to dicts, one at a time; ``read_rows`` is the list of them.
How: a specification is split into parts (``parts``), a part into files; ``readers`` knows the file
types and ``hub_rows`` the hub. Constraint: every row keeps its file and its number there, so that
messages can name it. Trade-off: weights are not applied here, because rows held out for evaluation
must be taken before any row is repeated; ``mix`` does that.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finegraft.core.errors import ConfigError, DataError, did_you_mean, near
from finegraft.data import hub_rows, readers, stdin
from finegraft.data.rows import renamed
from finegraft.data.stream_files import fingerprint as fingerprint_unread
from finegraft.data.stream_remote import Remote, is_url
from finegraft.data.stream_remote import files as remote_files

logger = logging.getLogger(__name__)

Spec = str | Path | Mapping[str, Any] | Sequence[Any]
_KEYS = ("path", "weight", "map")
_WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d+)?)")
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Part:
    """One origin of rows.

    Attributes:
        path: A file, a pattern, ``-``, ``hf:owner/name`` or a URL.
        weight: How often each of its rows is trained on in an epoch.
        map: Columns to rename, wanted to found.
    """

    path: str
    weight: float = 1.0
    map: Mapping[str, str] = field(default_factory=dict)


class Located(NamedTuple):
    """A row with the name of its file (or data set) and its number there, 1-based."""

    row: dict[str, Any]
    source: str
    number: int


def parts(spec: Spec) -> list[Part]:
    """Split a specification.

    Args:
        spec: A path, a path with a weight (``a.jsonl=2``), ``{"path": ..., "weight": ...,
            "map": ...}``, or a list of these.

    Raises:
        ConfigError: FG-DATA-030, a part that is none of these.
    """
    if isinstance(spec, str | Path | Mapping | Part):
        spec = [spec]
    if not spec:
        raise _bad_part("data is an empty list", "name at least one file")
    return [_part(item) for item in spec]


def _part(item: Any) -> Part:
    if isinstance(item, Part):
        return item
    if isinstance(item, str | Path):
        text = str(item)
        weighted = _WEIGHTED.fullmatch(text)
        if weighted is None or Path(text).exists():
            return Part(text)
        item = {"path": weighted[1], "weight": float(weighted[2])}
    if not isinstance(item, Mapping):
        raise _bad_part(f"data holds {type(item).__name__}: {item!r}", "name a file")
    unknown = next((key for key in item if key not in _KEYS), None)
    if unknown is not None:
        raise _bad_part(f"data has the key '{unknown}'", did_you_mean(str(unknown), _KEYS))
    path, weight, mapping = item.get("path"), item.get("weight", 1.0), item.get("map") or {}
    if not isinstance(path, str | Path) or not str(path):
        raise _bad_part(f"a part of data has no path: {dict(item)}", "path: rows.jsonl")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise _bad_part(f"the weight of {path} is {weight!r}", "weight: 2 shows each row twice")
    if not isinstance(mapping, Mapping):
        raise _bad_part(f"the map of {path} is {mapping!r}", "map: {prompt: question}")
    return Part(str(path), float(weight), {str(k): str(v) for k, v in mapping.items()})


def _bad_part(found: str, fix: str) -> ConfigError:
    return ConfigError(
        "FG-DATA-030",
        found,
        allowed="a path, a path with a weight (a.jsonl=2), or {path: a.jsonl, weight: 2, map: "
        "{prompt: question}}, or a list of these",
        fix=fix,
    )


def read_rows(spec: Spec, mapping: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Read every row; see ``iter_rows``."""
    return list(iter_rows(spec, mapping))


def iter_rows(spec: Spec, mapping: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a specification, file after file, holding no file in memory.

    Args:
        spec: As in ``parts``. Paths are .jsonl, .ndjson, .json, .csv, .tsv, .txt (a row
            ``{"text": ...}`` for each line that is not empty), the same compressed (.gz, .bz2, .xz,
            .zst), .parquet, .arrow, .feather or .xlsx files; patterns (``data/*.jsonl``); folders
            that datasets saved; ``-`` for standard input; ``hf:owner/name[/subset][:split]``; URLs
            that fsspec opens.
        mapping: Columns to rename, wanted to found, in the parts that have no ``map`` themselves.

    Yields:
        One dict per row. Weights change nothing here.

    Raises:
        ConfigError: FG-DATA-030, a part that cannot be understood.
        DataError: FG-DATA-001 no such file, FG-DATA-002 no rows at all, FG-DATA-003 a line that
            cannot be read (with its number), FG-DATA-004 a file type without a reader,
            FG-DATA-006 a part's ``map`` of a column that is not there, FG-DATA-031 and FG-DATA-032
            from the hub, FG-DATA-033 from standard input. What can be known before reading is
            raised by the call itself.
    """
    return (found.row for found in iter_located(spec, mapping))


def iter_located(spec: Spec, mapping: Mapping[str, str] | None = None) -> Iterator[Located]:
    """``iter_rows`` with each row's file and number there."""
    found = [(part.map or mapping or {}, files(part)) for part in parts(spec)]
    return _located(found, describe(spec))


def _located(files: list[tuple[Mapping[str, str], list[Any]]], told: str) -> Iterator[Located]:
    several = sum(len(found) for _, found in files) > 1
    total = 0
    for mapping, found in files:
        for file in found:
            count = 0
            rows = hub_rows.rows_of(file) if isinstance(file, str) else readers.rows_of(file)
            for count, row in enumerate(renamed(rows, mapping), 1):
                yield Located(row, str(file), count)
            total += count
            if not count and several:
                logger.warning("%s holds no rows", file)
    if not total:
        raise DataError(
            "FG-DATA-002", f"{told} holds no rows", fix="write at least one row into it"
        )


def files(part: Part) -> list[Any]:
    """The files of a part as paths; the name of a data set on the hub stays text.

    Raises:
        DataError: FG-DATA-001, there is none; FG-DATA-033, from standard input.
    """
    if part.path == stdin.NAME:
        return [stdin.saved()]
    if is_url(part.path):
        return list(remote_files(part.path))
    if hub_rows.is_name(part.path):
        return [part.path]
    path = Path(part.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _saved_by_datasets(path)
    if _PATTERN.search(part.path):
        found = sorted(p for p in map(Path, glob.glob(part.path, recursive=True)) if p.is_file())
        if found:
            return found
    raise _no_file(path)


def streamed(part: Part) -> list[Any]:
    """``files``, with a data set of the hub as the files that it consists of."""
    found = files(part)
    return [Remote(url) for url in hub_rows.files_of(part.path)] if found == [part.path] else found


def fingerprint_streamed(spec: Spec) -> str:
    """What tells the files of a specification apart without reading them, as hex."""
    return fingerprint_unread([file for part in parts(spec) for file in streamed(part)])


def _saved_by_datasets(path: Path) -> list[Path]:
    """The files of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: FG-DATA-001, another folder; which of its files are meant is not guessed.
    """
    if (path / "state.json").is_file():
        return sorted(path.glob("*.arrow"))
    splits = sorted(p.parent.name for p in path.glob("*/state.json"))
    files = sorted(p for p in path.iterdir() if p.is_file() and readers.readable(p))
    pattern = f"{path}/*{files[0].suffix}" if files else "the path of one file in it"
    raise DataError(
        "FG-DATA-001",
        f"{path} is a folder" + (f" with the splits {', '.join(splits)}" if splits else ""),
        allowed=", ".join(p.name for p in files[:10]) or None,
        fix=f"pass {path / splits[0]}" if splits else f"pass one file, or a pattern: {pattern}",
    )


def _no_file(path: Path) -> DataError:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = near(path.name, beside)
    known = sorted(name for name in beside if readers.readable(Path(name)))[:10]
    return DataError(
        "FG-DATA-001",
        f"there is no file {path}",
        allowed=", ".join(known) or None,
        fix=f"did you mean {path.parent / close}?" if close else "check the path of the data file",
    )


def fingerprint(spec: Spec) -> str:
    """Return the SHA-256 of what a specification names, as hex.

    Of one file it is that of its bytes. Of several it is that of their digests in order, so that
    moving or renaming them changes nothing. Data sets of the hub count by their rows, files behind
    a URL by what their server says that changes with the content.

    Raises:
        DataError: FG-DATA-001, no such file, and as ``iter_rows`` for the hub.
    """
    digests = [
        hub_rows.fingerprint(file) if isinstance(file, str) else _sha256(file)
        for part in parts(spec)
        for file in files(part)
    ]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _sha256(path: Path | Remote) -> str:
    if isinstance(path, Remote):
        return fingerprint_unread([path])
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def describe(spec: Spec) -> str:
    """A specification in a few words, for messages and records."""
    names = [part.path for part in parts(spec)]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def absolute(spec: Any) -> Any:
    """The specification with whole paths, so that a saved one can be read from any folder.

    Standard input becomes the file that it was saved in. The shape stays: text stays text.
    """
    if isinstance(spec, Mapping):
        return {**spec, "path": absolute(spec["path"])}
    if not isinstance(spec, str | Path):
        return [absolute(item) for item in spec]
    part = _part(spec)
    if is_url(part.path) or hub_rows.is_name(part.path):
        return str(spec)
    path = str(stdin.saved() if part.path == stdin.NAME else Path(part.path).absolute())
    return path if part.weight == 1.0 else f"{path}={part.weight:g}"
