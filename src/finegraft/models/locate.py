"""From what people type to a folder on the disk.

What: ``locate`` takes a packaged name, a folder, an adapter folder, a run folder, a GGUF file or a
hub name and returns where it lies and what it is. How: in that order, and never by guessing from
parts of a name. Constraint: a path that does not exist is an error about paths and never a question
to the hub. Trade-off: a local folder called ``demo`` must be written ``./demo``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finegraft.core.errors import ModelError, near
from finegraft.models import gguf, hub, packaged

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Located:
    """A model or adapter on this machine.

    Attributes:
        kind: ``directory`` for a whole model, ``adapter`` for one that needs ``base``.
        path: The folder.
        name: What was asked for, for messages and model cards.
        base: The adapter's base model, as its configuration names it; None for a whole model.
        revision: Revision on the hub that was asked for, or the base's own for an adapter.
    """

    kind: Literal["directory", "adapter"]
    path: Path
    name: str
    base: str | None = None
    revision: str | None = None


def _adapter(path: Path, name: str) -> Located:
    file = path / ADAPTER_CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        base, revision = values.get("base_model_name_or_path"), values.get("revision")
    except (ValueError, AttributeError) as error:
        raise ModelError(
            "FG-MODEL-008",
            f"{file} is not an adapter configuration: {error}",
            allowed="the JSON object that peft writes",
            fix="save or fetch the adapter again",
        ) from error
    return Located("adapter", path, name, base or None, revision or None)


def _folder(path: Path, name: str, revision: str | None) -> Located:
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, name)
    if (path / "config.json").is_file():
        return Located("directory", path, name, None, revision)
    if (path / "adapter" / ADAPTER_CONFIG).is_file():
        return _adapter(path / "adapter", name)
    if (path / "model" / "config.json").is_file():  # a run that trained every weight
        return Located("directory", path / "model", name, None, revision)
    inside = sorted(p.name for p in path.iterdir())[:8]
    files = [str(p.relative_to(path)) for p in path.glob("*.gguf")]
    raise ModelError(
        "FG-MODEL-008",
        f"the folder {path} holds no model; it holds {', '.join(inside) or 'nothing'}",
        allowed="a folder with config.json (model), adapter_config.json (adapter) or a run folder",
        fix=f"pass {path / files[0]}" if files else "pass the folder that holds config.json",
    )


def _file(path: Path, name: str) -> Located:
    with open(path, "rb") as handle:
        magic = handle.read(4)
    if path.suffix.lower() == ".gguf" or magic == b"GGUF":
        return Located("directory", gguf.convert(path), name)
    raise ModelError(
        "FG-MODEL-001",
        f"{path} is a file, and not a GGUF file",
        allowed="a folder, or a .gguf file",
        fix=f"pass the folder: {path.parent}",
    )


def looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", os.sep))
        or name.lower().endswith(".gguf")
        or "\\" in name
        or name.count("/") > 1
    )


def _no_such_path(path: Path) -> ModelError:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    beside = sorted(p.name for p in folder.iterdir())
    close = near(path.name, beside) if folder == path.parent else None
    return ModelError(
        "FG-MODEL-001",
        f"there is no {path}",
        allowed=f"in {folder}: " + (", ".join(beside[:12]) or "nothing"),
        fix=f"did you mean '{folder / close}'?" if close else "correct the path",
    )


def locate(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Located:
    """Find a model, fetching or converting it where that is needed.

    Args:
        name: ``demo``, ``demo-encoder``, a folder with a model, adapter or run, a ``.gguf`` file,
            or ``owner/name`` on the hub.
        revision: Branch, tag or commit, for hub names only.
        token: Access token, for hub names only.

    Raises:
        ModelError: FG-MODEL-001 to FG-MODEL-008, see ``docs/errors.md``.
        StorageError: FG-DISK-001 to FG-DISK-003, the cache cannot take it.
    """
    text = str(name)
    if text in packaged.names():
        return Located("directory", packaged.fetch(text), text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, text, revision)
    if path.is_file():
        return _file(path, text)
    if isinstance(name, Path) or looks_like_path(text):
        raise _no_such_path(path)
    return _folder(hub.download(text, revision, token), text, revision)
