"""One process at a time in a run folder.

What: ``alone`` holds a folder for a block, ``in_use`` says whether somebody does. How: a lock of
the operating system on a file in the folder (``filelock``), which ends with the process that holds
it, however that ends. Constraint: a kill never leaves a folder locked. Trade-off: the file itself
stays after a kill; the next holder takes it over and removes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finegraft.core.errors import ConfigError
from finegraft.core.paths import storage_error

NAME = ".lock"
_WAIT_SECONDS = 0.5  # ``in_use`` holds the lock for a moment; that is not another run


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for the block.

    Args:
        folder: An existing folder.

    Raises:
        ConfigError: FG-RUN-004, another process holds it.
        StorageError: FG-DISK-002, the lock cannot be written.
    """
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=_WAIT_SECONDS)
    except Timeout as error:
        raise ConfigError(
            "FG-RUN-004",
            f"another process is working on {folder}",
            allowed="one process a run folder",
            fix="wait for it or stop it; --output takes another folder",
        ) from error
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)  # while held, so nobody holds what has no name
        lock.release()


def in_use(folder: Path) -> bool:
    """Whether a process holds ``folder`` now."""
    if not (folder / NAME).exists():
        return False
    try:
        with alone(folder):
            return False
    except ConfigError:
        return True
