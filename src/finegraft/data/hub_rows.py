"""Rows of data sets on the hub.

What: ``hf:owner/name[/subset][:split]`` (or ``owner/name`` where no such file is) to rows. How:
``datasets.load_dataset``, so its cache, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work
as everywhere else. Constraint: a split or subset is never guessed where there are several, except
that training reads the split ``train``. Trade-off: the fingerprint is of the rows, not of the
files, because the cache keeps them in a form of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finegraft.core.errors import DataError
from finegraft.data import readers

PREFIX = "hf:"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.\[\]%:-]+))?")


def is_name(path: str) -> bool:
    """Whether a path means a data set: it says ``hf:``, or looks like one and is no local path."""
    if path.startswith(PREFIX):
        return True
    found = _NAME.fullmatch(path)
    if found is None or path.startswith(".") or found[2]:
        return False
    local = Path(path)
    return not (local.exists() or local.parent.is_dir() or readers.readable(local))


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set.

    Raises:
        DataError: FG-DATA-031 it cannot be had, FG-DATA-032 a subset or split must be named.
    """
    for row in _loaded(name):
        yield dict(row)


def fingerprint(name: str) -> str:
    """SHA-256 over the rows of a data set, as hex."""
    digest = hashlib.sha256()
    for row in _loaded(name):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def files_of(name: str) -> list[str]:
    """The files of a split as URLs, for reading them without a copy on this machine.

    Raises:
        DataError: as ``rows_of``.
    """
    return list(_opened(name, _files))


def _files(repo: str, subset: str | None, split: str) -> Any:
    import datasets

    return datasets.load_dataset_builder(repo, subset).config.data_files[split]


@functools.lru_cache(maxsize=4)
def _loaded(name: str) -> Any:
    return _opened(name, _load)


def _load(repo: str, subset: str | None, split: str) -> Any:
    import datasets

    return datasets.load_dataset(repo, subset, split=split)


def _opened(name: str, use: Callable[[str, str | None, str], Any]) -> Any:
    """``use`` of the repository, subset and split that a name means."""
    import datasets
    from huggingface_hub import errors

    found = _NAME.fullmatch(name.removeprefix(PREFIX))
    if found is None:
        raise _unavailable(name, "that is no name of a data set")
    repo, subset, split = found.groups()
    try:
        splits = datasets.get_dataset_split_names(repo, subset) if split is None else [split]
        if split is None:
            split = _only(name, splits)
        return use(repo, subset, split)
    except KeyError as error:
        raise _choose(name, "splits", f"{repo}:<split>", f"it has no split {error}") from error
    except ValueError as error:
        said = str(error)
        if "Config name is missing" in said or "BuilderConfig" in said:
            known = datasets.get_dataset_config_names(repo)
            told = f"it has the subsets {', '.join(known)}"
            raise _choose(name, "subsets", f"{repo}/{known[0]}", told) from error
        if "Unknown split" in said or "split" in said.lower():
            raise _choose(name, "splits", f"{repo}:<split>", _first_line(said)) from error
        raise _unavailable(name, _first_line(said)) from error
    except (OSError, errors.HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise _unavailable(name, _first_line(str(error))) from error


def _only(name: str, splits: list[str]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    fix = f"{name}:{splits[0]}"
    raise _choose(name, "splits", fix, f"it has the splits {', '.join(splits)}")


def _choose(name: str, what: str, fix: str, said: str) -> DataError:
    return DataError(
        "FG-DATA-032",
        f"'{name}' has several {what}, and which one is meant is not said: {said}",
        allowed="hf:owner/name/subset:split",
        fix=f"--data hf:{fix.removeprefix(PREFIX)}",
    )


def _unavailable(name: str, reason: str) -> DataError:
    return DataError(
        "FG-DATA-031",
        f"'{name}' is no file, and the hub gives no such data set: {reason}",
        allowed="a file, a pattern such as data/*.jsonl, or hf:owner/name[/subset][:split]",
        fix="check the spelling; a private data set needs HF_TOKEN, a mirror HF_ENDPOINT",
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
