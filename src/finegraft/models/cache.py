"""A converted model is made once, by one process, and found whole by all others.

What: ``once`` returns a folder that carries the wanted stamp, making it if it is missing or stale.
How: a lock file beside the folder (two processes that both miss it must not convert twice), a look
again under the lock, and ``whole_folder`` for the writing. Constraint: a folder without its stamp
does not exist as far as this module is concerned. Trade-off: a lock file stays beside each folder;
removing it would let a third process lock a name that nobody else sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError
from finegraft.core.paths import cache_dir, require_writable, storage_error, whole_folder

STAMP = "finegraft.json"


def models_dir() -> Path:
    """Return the folder of converted models, ``<cache>/models``."""
    return cache_dir() / "models"


def is_current(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether ``folder`` was written whole and from the source that ``stamp`` names."""
    try:
        return bool(json.loads((folder / STAMP).read_text(encoding="utf-8")) == stamp)
    except (OSError, ValueError):
        return False


def once(final: Path, stamp: dict[str, Any], make: Callable[[], Callable[[Path], None]]) -> Path:
    """Return ``final``, made if it is missing or carries another stamp.

    Args:
        final: The folder.
        stamp: What identifies the source and the conversion; compared as JSON.
        make: Does the slow work and returns the function that writes it into an empty folder. In
            two steps, so that a failure to read is never reported as a failure to write.

    Raises:
        StorageError: FG-DISK-001 to FG-DISK-003, the cache folder cannot take it.
    """
    if is_current(final, stamp):
        return final
    from filelock import FileLock

    require_writable(final.parent)
    with FileLock(str(final.parent / f".{final.name}.lock")):
        if is_current(final, stamp):
            return final
        try:
            write = make()
        except OSError as error:
            if isinstance(error, FinegraftError):
                raise
            raise storage_error(error, final) from error
        with whole_folder(final) as folder:
            write(folder)
            (folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    return final
