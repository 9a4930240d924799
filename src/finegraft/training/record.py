"""What a run says about where and with what it was made, and how it ended.

What: the ``run`` event (settings, versions, hardware, process) and digests of the rows, so that two
runs can be compared when neither the data nor the machine is there any more. How: installed
versions and facts only; nothing is measured and no environment variable is kept but those that
change arithmetic or memory. Constraint: a short hash of each row is kept for the first
``MOST_HASHES`` rows, so that a changed row can be named; the text of rows is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
from array import array
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from finegraft.core.errors import FinegraftError, StorageError
from finegraft.core.hardware import facts
from finegraft.core.schema import TrainConfig
from finegraft.training.distributed import world
from finegraft.training.events import EventLog
from finegraft.training.report import page

LIBRARIES = (
    "finegraft",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "numpy",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
MOST_HASHES = 5000  # rows; 8 letters each
_MOST_ROWS = 200_000  # rows that go into the digests
_HASH_LETTERS = 8


def about(config: TrainConfig) -> dict[str, Any]:
    """The values of a ``run`` event."""
    found = facts()
    process = psutil.Process()
    return {
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "hardware": {
            "cpu": found.cpu,
            "cores": found.cores,
            "threads": torch.get_num_threads(),
            "memory_bytes": found.memory_bytes,
            "gpus": list(found.gpus),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "process": {
            "pid": process.pid,
            "started": round(process.create_time(), 2),
            "host": socket.gethostname(),
        },
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what training computes."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def digests(rows: Any) -> dict[str, Any] | None:
    """Fingerprints of rows as they are trained on: ids and labels, in order and without order.

    Args:
        rows: Anything with lists of ``input_ids`` and ``labels``, as attributes or columns; None.

    Returns:
        ``rows`` is the same for the same rows in any order, ``order`` is not; ``hashes`` are the
        rows' own, joined. None where there are no rows to look at, a stream say.
    """
    columns = _columns(rows)
    if columns is None:
        return None
    total, ordered, short = 0, hashlib.sha256(), []
    for ids, labels in islice(zip(*columns, strict=True), _MOST_ROWS):
        digest = _row_digest(ids, labels)
        total = (total + int.from_bytes(digest, "big")) % (1 << 128)
        ordered.update(digest)
        if len(short) < MOST_HASHES:
            short.append(digest.hex()[:_HASH_LETTERS])
    return {"rows": f"{total:032x}", "order": ordered.hexdigest()[:32], "hashes": "".join(short)}


def _columns(rows: Any) -> tuple[Iterable[Any], Iterable[Any]] | None:
    if rows is None:
        return None
    if hasattr(rows, "input_ids"):
        return rows.input_ids, rows.labels
    names = getattr(rows, "column_names", None)
    if names and hasattr(rows, "__len__") and {"input_ids", "labels"} <= set(names):
        return _column(rows, "input_ids"), _column(rows, "labels")
    return None


def _column(rows: Any, name: str) -> Iterator[Any]:
    for start in range(0, len(rows), 1000):
        yield from rows[start : start + 1000][name]


def _row_digest(ids: Any, labels: Any) -> bytes:
    digest = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16)
    digest.update(repr(labels).encode() if not isinstance(labels, list) else b"")
    if isinstance(labels, list):
        whole = all(isinstance(label, int) for label in labels)
        digest.update(array("q" if whole else "d", labels).tobytes())
    return digest.digest()


def add_digests(record: dict[str, Any], data: Any) -> None:
    """Put the digests of checked rows into what becomes ``data.json``; of streamed ones none."""
    if record.get("streamed"):
        return
    for key, name in (("train", "train"), ("held_out", "held_out")):
        found = digests(getattr(data, name, None))
        if found:
            record.setdefault("digests", {})[key] = found


class Endings:
    """A block whose failure becomes a ``failed`` event, or ``stopped``; the error goes on.

    Args:
        log: Where to tell it.
        run: The folder whose page is drawn then, so that it shows what went wrong.
    """

    def __init__(self, log: EventLog, run: Path):
        self.log = log
        self.run = run

    def __enter__(self) -> Endings:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            with contextlib.suppress(StorageError):  # a full disk must not hide the first error
                self._tell(kind, error)
                page.write(self.run)

    def _tell(self, kind: Any, error: BaseException) -> None:
        if world.here().several and world.is_lost(error):
            self.log.emit("notice", message="the connection to another process was lost")
            return
        if isinstance(error, KeyboardInterrupt):
            self.log.emit("stopped", message="stopped at once, without saving this step")
            return
        code = error.code if isinstance(error, FinegraftError) else None
        words = error.found if isinstance(error, FinegraftError) else f"{kind.__name__}: {error}"
        self.log.emit("failed", code=code, message=words[:2000])
