"""Checkpoints that are whole or not there.

What: a checkpoint is written beside its place and renamed when complete. How: while it is written
the trainer sees a staging folder as its output. Constraint: a crash, a full disk or a kill leaves
the older checkpoints as they were and never a folder that looks complete and is not.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from finegraft.core.errors import FinegraftError
from finegraft.core.paths import storage_error, whole_folder

PREFIX = "checkpoint-"
_STATE = "trainer_state.json"
_TORCH_WRITES = ("PytorchStreamWriter failed", "unexpected pos", "No space left")


def checkpoints(folder: Path) -> list[Path]:
    """Return complete checkpoints in ``folder``, oldest step first."""
    found = [
        path
        for path in Path(folder).glob(f"{PREFIX}*")
        if path.name[len(PREFIX) :].isdigit() and (path / _STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn what libraries say about a full disk into FG-DISK-001.

    safetensors and torch report a failed write as errors of their own, which name no errno.

    Raises:
        StorageError: FG-DISK-001, FG-DISK-002 or FG-DISK-003.
    """
    try:
        yield
    except FinegraftError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error
    except (SafetensorError, RuntimeError) as error:
        words = str(error)
        named = re.search(r"os error (\d+)", words)  # how Rust shows an errno
        if named:
            raise storage_error(OSError(int(named[1]), words), path) from error
        if any(sign in words for sign in _TORCH_WRITES):
            raise storage_error(OSError(errno.ENOSPC, words), path) from error
        raise


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a folder to write the checkpoint ``final`` into; see the module.

    The folder is called like ``final`` inside a staging folder, because the trainer builds that
    name itself.
    """
    with full_disk_named(final), whole_folder(final.parent / f"{final.name}.saving") as staging:
        yield staging
        inner = staging / final.name
        state = inner / _STATE
        if state.is_file():  # the best checkpoint's path must be the final one
            text = state.read_text(encoding="utf-8")
            state.write_text(text.replace(str(inner), str(final)), encoding="utf-8")
    saved = final.parent / f"{final.name}.saving"
    if final.exists():
        shutil.rmtree(final)
    (saved / final.name).rename(final)
    saved.rmdir()
