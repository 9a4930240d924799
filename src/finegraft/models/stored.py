"""Models that lie on this machine already: in finegraft's cache and in the hub's.

What: ``models`` lists them with their size, ``remove`` frees the space of one. How: finegraft's own
folders by name; the hub's cache by ``huggingface_hub``, which also removes. Constraint: nothing is
read but names and sizes, and torch is not imported. Trade-off: converted GGUF files have the name
of their folder in the cache, which is not the name of the file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.errors import ModelError, did_you_mean
from finegraft.core.paths import storage_error
from finegraft.models import cache, packaged

PACKAGED = tuple(packaged.names())


@dataclass(frozen=True)
class Stored:
    """One model.

    Attributes:
        name: As it is typed for ``--model``.
        kind: ``packaged``, ``converted`` (from a GGUF file) or ``hub``.
        size_bytes: On the disk.
        path: The folder.
    """

    name: str
    kind: str
    size_bytes: int
    path: Path


def models() -> list[Stored]:
    """Every model in the caches, packaged ones first."""
    return [*_own(), *_hub()]


def _own() -> list[Stored]:
    folder = cache.models_dir()
    if not folder.is_dir():
        return []
    found = [
        Stored(
            path.name if path.name in PACKAGED else str(path),
            "packaged" if path.name in PACKAGED else "converted",
            _size(path),
            path,
        )
        for path in sorted(folder.iterdir())
        if (path / "config.json").is_file() and not path.name.startswith(".")
    ]
    return sorted(found, key=lambda one: one.kind != "packaged")


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _hub_cache() -> Any:
    """The hub's own description of its cache; None without one."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None


def _hub() -> list[Stored]:
    found = _hub_cache()
    repos = [repo for repo in found.repos if repo.repo_type == "model"] if found else []
    listed = [
        Stored(repo.repo_id, "hub", repo.size_on_disk, Path(repo.repo_path)) for repo in repos
    ]
    return sorted(listed, key=lambda one: one.name)


def remove(name: str) -> Stored:
    """Free the space of a model and return what it was; it is fetched again when it is wanted.

    Raises:
        ModelError: FG-MODEL-001, no model of that name is stored.
        StorageError: FG-DISK-002, its files cannot be removed.
    """
    every = models()
    found = next((one for one in every if one.name == name), None)
    if found is None:
        names = [one.name for one in every]
        raise ModelError(
            "FG-MODEL-001",
            f"no model '{name}' is stored on this machine",
            allowed=", ".join(names) or "none is",
            fix=did_you_mean(name, names) if names else "`finegraft models fetch demo` stores one",
        )
    try:
        if found.kind == "hub":
            _remove_from_hub(name)
        else:
            shutil.rmtree(found.path)
    except OSError as error:
        raise storage_error(error, found.path) from error
    return found


def _remove_from_hub(name: str) -> None:
    scanned = _hub_cache()
    repos = [r for r in scanned.repos if r.repo_type == "model" and r.repo_id == name]
    revisions = [revision.commit_hash for repo in repos for revision in repo.revisions]
    scanned.delete_revisions(*revisions).execute()
