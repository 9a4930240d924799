"""Deleting that can be undone: runs are moved aside, inside the workspace.

What: ``Trash`` moves a run away, back, and empties itself when asked. How: a folder for each, with
a note of where it was; moving is one rename. Constraint: nothing is overwritten by a restore, and
nothing is emptied unasked. Trade-off: the space on the disk is free only after emptying.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError
from finegraft.core.paths import storage_error, write_whole
from finegraft.ui.workspace import TRASH, Workspace

_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
_NOTE = "from.json"


class Trash:
    """What was deleted in a workspace."""

    def __init__(self, space: Workspace):
        self.space = space

    def take(self, path: Path) -> dict[str, Any]:
        """Move a folder away and return how to get it back.

        Raises:
            StorageError: FG-DISK-001 to FG-DISK-003.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = self.space.trash / name
        was = self.space.name_of(path)
        try:
            folder.mkdir(parents=True)
            write_whole(folder / _NOTE, json.dumps({"path": was, "time": time.time()}))
            path.rename(folder / "kept")
        except OSError as error:
            raise storage_error(error, folder) from error
        command = shlex.join(["mv", was, f"{TRASH}/{name}/kept"])
        return {"undo": name, "path": was, "command": command}

    def restore(self, name: str) -> str:
        """Move a folder back and return its path.

        Raises:
            ConfigError: FG-UI-018 not in the trash, FG-UI-019 its place is taken.
        """
        folder = self._folder(name)
        was = self.space.inside(json.loads((folder / _NOTE).read_text(encoding="utf-8"))["path"])
        if was.exists():
            raise ConfigError(
                "FG-UI-019",
                f"{self.space.name_of(was)} is there again",
                allowed="a place where nothing is",
                fix=f"rename it, or take the old one from {TRASH}/{name}/kept",
            )
        try:
            was.parent.mkdir(parents=True, exist_ok=True)
            (folder / "kept").rename(was)
        except OSError as error:
            raise storage_error(error, was) from error
        shutil.rmtree(folder, ignore_errors=True)
        return self.space.name_of(was)

    def _folder(self, name: str) -> Path:
        folder = self.space.trash / name
        if not _ID.fullmatch(name) or not (folder / _NOTE).is_file():
            raise ConfigError(
                "FG-UI-018",
                f"'{name[:40]}' is not in the trash",
                allowed="what was deleted here and not restored since",
                fix=f"see the folder {TRASH}/ in the workspace",
            )
        return folder

    def entries(self) -> list[dict[str, Any]]:
        """What lies in it, the newest first."""
        if not self.space.trash.is_dir():
            return []
        found = []
        for folder in sorted(self.space.trash.iterdir(), reverse=True):
            if not _ID.fullmatch(folder.name) or not (folder / _NOTE).is_file():
                continue
            note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
            size = sum(p.lstat().st_size for p in (folder / "kept").rglob("*") if p.is_file())
            found.append({"id": folder.name, **note, "size_bytes": size})
        return found

    def empty(self) -> int:
        """Remove all of it for good; returns the bytes that were freed."""
        freed = 0
        for entry in self.entries():
            shutil.rmtree(self.space.trash / entry["id"], ignore_errors=True)
            freed += entry["size_bytes"]
        return freed
