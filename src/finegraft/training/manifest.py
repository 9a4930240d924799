"""What a checkpoint must contain, written into it, so that a damaged one is known for what it is.

What: ``manifest.json`` names every file with its size and SHA-256, and keeps what the run was at
that step: configuration, rows, base model, versions, counters. How: written last, when all other
files are complete. Constraint: a checkpoint that lost a byte is never resumed from. Trade-off:
every file is read once after it was written and once at resume (about a second a gigabyte).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write the manifest of all files that are in ``folder`` now.

    Args:
        folder: A checkpoint that is complete but for this.
        record: What else to keep; JSON.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    text = json.dumps({**record, "files": files}, indent=1, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where there is none that can be read."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("files"), dict) else None


def damage(folder: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint, or None when each byte is as written."""
    found = read(folder)
    if found is None:
        return f"{NAME} is missing" if not (folder / NAME).exists() else f"{NAME} is cut off"
    for name, expected in found["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
