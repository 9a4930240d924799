"""Where files go, and how they get there whole.

What: the cache folder (XDG), folder checks before work starts, and writing beside-then-renaming.
Constraint: nobody ever finds a half-written file or folder under its final name, whatever stopped
us, a power cut included: contents and names are on the disk before the next thing is done.
Trade-off: while a folder is replaced both copies are on the disk for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from finegraft.core.errors import FinegraftError, StorageError


def cache_dir() -> Path:
    """Return finegraft's cache folder, ``$XDG_CACHE_HOME/finegraft`` or ``~/.cache/finegraft``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "finegraft"


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turn an operating-system error about ``path`` into one that says what to do.

    Codes: FG-DISK-001 no space, FG-DISK-002 not writable, FG-DISK-003 anything else.
    """
    free = ""
    with contextlib.suppress(OSError):
        anchor = next(p for p in (path, *path.absolute().parents) if p.exists())
        left = shutil.disk_usage(anchor).free
        free = f" ({left / 1e9:,.1f} GB free)" if left >= 1e9 else f" ({left / 1e6:,.1f} MB free)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            "FG-DISK-001",
            f"the disk is full while writing {_final(path)}{free}",
            fix="free some space or pass --output with a folder on another disk; "
            "nothing half-written was left",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        blocking = next((p for p in (path, *path.parents) if p.is_file()), None)
        reason = f"{blocking} is a file" if blocking else os.strerror(error.errno)
        return StorageError(
            "FG-DISK-002",
            f"cannot write to {path}: {reason}",
            allowed="a folder that you may write to",
            fix="pass --output with another folder, or change the permissions of this one",
        )
    return StorageError(
        "FG-DISK-003",
        f"writing {path} failed: {error}",
        fix="make the folder writable again, or pass --output with another one",
    )


def _final(path: Path) -> Path:
    """The name that a path inside a ``.name.12345678.partial`` folder will have in the end."""
    for whole in reversed((path, *path.parents)):
        if whole.suffix == ".partial":
            name = whole.stem.removeprefix(".").rsplit(".", 1)[0]
            return whole.parent / name.removesuffix(".saving")
    return path


def require_writable(folder: Path) -> None:
    """Make ``folder`` and prove that files can be written in it.

    Raises:
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"finegraft")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise storage_error(error, folder) from error


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside ``final`` that takes its name when the block ends well.

    An existing ``final`` is replaced only then; on any error the new folder is removed and the old
    one stands untouched.
    """
    final = Path(final)
    beside = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        beside.mkdir(parents=True)
        yield beside
        sync(beside)
        replace_folder(beside, final)
    except FinegraftError:
        raise
    except OSError as error:
        raise storage_error(error, final) from error
    finally:  # gone already when all went well
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(new: Path, final: Path) -> None:
    """Give ``new`` the name ``final``, moving an older ``final`` out of the way first."""
    old = None
    if final.exists():
        old = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.old"
        final.rename(old)
    new.rename(final)
    sync_names(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one, never half."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(beside, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
        sync_names(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What writers of this module left in ``folder`` when they were killed."""
    return [
        path
        for path in Path(folder).glob(".*")
        if path.suffix in (".partial", ".old") or path.name.startswith(".probe-")
    ]


def sync(folder: Path) -> None:
    """Wait until every file in ``folder`` and every name in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            sync_names(path)


def sync_names(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network folders
            raise
    finally:
        os.close(handle)
