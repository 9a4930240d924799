"""A run's checkpoints in a place that outlives the machine: a folder, s3://, or what fsspec knows.

What: ``Store`` keeps one run under one address: its small files and newest checkpoints, in the end
also what was trained. How: fsspec copies whole files; ``latest.json`` is written last and names
every file with its size, so a transfer that was cut is never taken for a checkpoint. Constraint: a
checkpoint is fetched only where it is newer than what lies in the run folder. Trade-off: training
waits while a checkpoint is copied.

Units: bytes, steps.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from finegraft.core.errors import StorageError
from finegraft.core.paths import replace_folder
from finegraft.training import checkpoint

logger = logging.getLogger(__name__)

LATEST = "latest.json"
_SMALL = ("config.yaml", "data.json", "events.jsonl")
_TRAINED = ("adapter", "model", "report")


class Store:
    """One run at an address.

    Args:
        address: ``s3://bucket/folder``, ``file:///folder``, a plain folder, ...; the run lies in a
            folder of it with the run's name.
        name: Of the run.

    Raises:
        StorageError: FG-RAY-003, no such file system or it cannot be reached.
    """

    def __init__(self, address: str, name: str):
        self.address = f"{address.rstrip('/')}/{name}"
        with _named(self.address):
            self.files, self.root = url_to_fs(self.address)

    def latest(self) -> dict[str, Any] | None:
        """What lies there: ``step``, ``done`` and ``files``; None: nothing."""
        path = f"{self.root}/{LATEST}"
        with _named(self.address):
            if not self.files.exists(path):
                return None
            return dict(json.loads(self.files.cat_file(path)))

    def require_writable(self) -> None:
        """Raises StorageError FG-RAY-003 where nothing can be written."""
        probe = f"{self.root}/.probe"
        with _named(self.address):
            self.files.makedirs(self.root, exist_ok=True)
            self.files.pipe_file(probe, b"finegraft")
            self.files.rm_file(probe)

    def clear(self) -> None:
        """Remove what lies there."""
        with _named(self.address):
            if self.files.exists(self.root):
                self.files.rm(self.root, recursive=True)

    def keep(self, run: Path, step: int, *, keep: int) -> None:
        """Copy the checkpoint of a step there.

        Args:
            run: The run folder.
            step: Of the checkpoint.
            keep: Checkpoints that stay there.
        """
        name = f"{checkpoint.PREFIX}{step}"
        folder = run / "checkpoints" / name
        files = [path for path in folder.rglob("*") if path.is_file()]
        self._publish(run, [*files, *_small(run)], {"step": step, "done": False})
        self._rotate(keep)

    def finish(self, run: Path) -> None:
        """Copy what was trained there, instead of the checkpoints."""
        folders = [run / name for name in _TRAINED if (run / name).is_dir()]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        self._publish(run, [*files, *_small(run)], {"done": True})
        self._rotate(0)

    def _publish(self, run: Path, files: list[Path], about: dict[str, Any]) -> None:
        sizes = {}
        with _named(self.address):
            for path in files:
                name = path.relative_to(run).as_posix()
                target = f"{self.root}/{name}"
                self.files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                self.files.put_file(str(path), target)
                sizes[name] = self.files.size(target)
            text = json.dumps({**about, "files": sizes}, indent=2) + "\n"
            self.files.pipe_file(f"{self.root}/{LATEST}", text.encode())

    def _rotate(self, keep: int) -> None:
        folder = f"{self.root}/checkpoints"
        with _named(self.address):
            if not self.files.exists(folder):
                return
            self.files.invalidate_cache()
            found = [name.rstrip("/") for name in self.files.ls(folder, detail=False)]
            found = [name for name in found if name.rsplit("-", 1)[-1].isdigit()]
            found.sort(key=lambda name: int(name.rsplit("-", 1)[-1]))
            for old in found[: len(found) - keep]:
                self.files.rm(old, recursive=True)

    def fetch(self, run: Path, tell: Callable[[str], None]) -> bool:
        """Bring what lies there into a run folder that lacks it.

        Args:
            run: The run folder; one with a checkpoint as new stays as it is.
            tell: Called with what was done.

        Returns:
            Whether there is something to go on with.

        Raises:
            StorageError: FG-RAY-003, or FG-RAY-004: what lies there is not whole.
        """
        latest = self.latest()
        if latest is None:
            return (run / "data.json").is_file()
        own, _ = checkpoint.newest(run / "checkpoints")
        if own is not None and checkpoint.step_of(own) >= latest.get("step", 0):
            return True
        beside = run.parent / f".{run.name}.fetching.partial"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            self._copy_to(beside, latest["files"])
            replace_folder(beside, run)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        tell(f"fetched the run from {self.address}")
        return True

    def _copy_to(self, folder: Path, files: dict[str, int]) -> None:
        with _named(self.address):
            for name, size in files.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(f"{self.root}/{name}", str(target))
                # events.jsonl may be longer there by now; it is only ever appended to
                there = target.stat().st_size
                if there < size:
                    raise StorageError(
                        "FG-RAY-004",
                        f"{self.address}/{name} has {there:,} bytes and not {size:,}",
                        allowed=f"the files that its {LATEST} names",
                        fix="restore the file, or start a new run with another --storage",
                    )


def _small(run: Path) -> list[Path]:
    return [path for name in _SMALL if (path := run / name).is_file()]


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Turn what file systems raise into FG-RAY-003.

    ``ImportError`` is a file system whose package is not installed; ``ValueError`` an unknown one.
    """
    try:
        yield
    except StorageError:
        raise
    except (ImportError, ValueError, OSError, *_errors_of_services()) as error:
        words = f"{type(error).__name__}: {error}"
        raise StorageError(
            "FG-RAY-003",
            f"the storage {address} cannot be used: {words[:500]}",
            allowed="a folder that all machines share, or s3://, gs://, ... as fsspec knows them "
            f"({', '.join(sorted(fsspec.available_protocols())[:12])}, ...)",
            fix="check the address and your access to it; s3:// needs `pip install s3fs`",
        ) from error


def _errors_of_services() -> tuple[type[BaseException], ...]:
    """What clients of object stores raise, which is no OSError; only of those that are in use."""
    import sys

    core = sys.modules.get("botocore.exceptions")
    return (core.BotoCoreError, core.ClientError) if core else ()
