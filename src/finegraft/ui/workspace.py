"""The folder that the page works in, and the rule that nothing outside of it is touched.

What: ``Workspace`` turns what a page sends into paths. How: a name is joined to the root, resolved
with all its links, and must still lie inside. Constraint: the page's own records are not files that
it can name. Trade-off: a link to a disk elsewhere is refused as well; start the server in a folder
that holds both.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError, did_you_mean
from finegraft.core.paths import require_writable
from finegraft.data import sources
from finegraft.data.readers import readable

OWN = ".finegraft-ui"
TRASH = ".trash"
RUNS, DATA, CONFIGS, EXPORTS, REPORTS = "runs", "data", "configs", "exports", "reports"
_LONGEST = 1024  # letters of a name
_NAME = re.compile(r"[^\W_][\w.\- ]*(/[^\W_][\w.\- ]*)*")
_HUB = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_FREE_TEXT = {".txt", ".json"}  # beside other things in a folder these are seldom rows
_MOST_FILES = 500
_REMOTE = ("http://", "https://", "s3://", "gs://")


class Workspace:
    """A folder.

    Args:
        root: It; made where it is missing.

    Raises:
        StorageError: FG-DISK-001 to FG-DISK-003, nothing can be written there.
    """

    def __init__(self, root: Path):
        require_writable(root)
        self.root = root.resolve()
        self.runs = self.root / RUNS
        self.own = self.root / OWN
        self.trash = self.root / TRASH

    def inside(self, name: str) -> Path:
        """The whole path of something in the workspace, links followed.

        Raises:
            ConfigError: FG-UI-005, it lies elsewhere.
        """
        try:
            if not name or len(name) > _LONGEST or "\0" in name:
                raise ValueError(name)
            path = (self.root / name).resolve()
            parts = path.relative_to(self.root).parts
        except (OSError, ValueError, RuntimeError):  # a loop of links, a letter no file can have
            raise self._outside(name) from None
        if not parts or parts[0] in (OWN, TRASH):
            raise self._outside(name)
        return path

    def _outside(self, name: str) -> ConfigError:
        shown = name.encode("utf-8", "replace").decode().replace("\0", "\\0")[:120]
        return ConfigError(
            "FG-UI-005",
            f"'{shown}' is not in the folder that this page works in",
            allowed=f"files and folders inside {self.root}",
            fix="copy it there, or start `finegraft ui --workspace` with a folder that holds it",
        )

    def name_of(self, path: Path) -> str:
        """The path as it is typed inside the workspace."""
        name = path.relative_to(self.root).as_posix()
        return f"./{name}" if name.startswith(("-", "~")) else name

    def run_folder(self, name: str) -> Path:
        """Where the run of a name lies or will lie.

        Raises:
            ConfigError: FG-UI-005 elsewhere, FG-UI-009 a name that no run can have.
        """
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise ConfigError(
                "FG-UI-009",
                f"'{name[:80]}' cannot be the name of a run",
                allowed="letters, digits, dots, dashes, underscores and spaces, beginning with a "
                "letter or a digit",
                fix="choose another name",
            )
        path = self.inside(f"{RUNS}/{name}")
        if not path.is_relative_to(self.runs):
            raise self._outside(name)
        return path

    def run(self, name: str) -> Path:
        """The folder of a run that is there.

        Raises:
            ConfigError: FG-UI-015, there is none; FG-UI-005.
        """
        from finegraft.training.report import read

        path = self.inside(f"{RUNS}/{name}")
        if self.runs in path.parents and path.is_dir() and read.is_run(path):
            return path
        names = [found.relative_to(self.runs).as_posix() for found in read.runs(self.runs)]
        raise ConfigError(
            "FG-UI-015",
            f"no run '{name}' in {RUNS}/",
            allowed=", ".join(names[:12]) or "none yet; train one first",
            fix=did_you_mean(name, names) if names else "start one on the page Train",
        )

    def rows(self, spec: Any) -> None:
        """Prove that rows come from the workspace, from the hub or from the web.

        Raises:
            ConfigError: FG-UI-005; FG-DATA-030, no specification of rows.
        """
        for part in sources.parts(spec):
            if part.path.startswith(("hf:", *_REMOTE)):
                continue
            if part.path == "-" or "://" in part.path:  # other schemes open local files as well
                raise self._outside(part.path)
            self.inside(part.path)
            for found in glob.glob(part.path, root_dir=self.root, recursive=True):
                self.inside(found)

    def model(self, name: str) -> str:
        """A model as it is typed: a name of the hub, a packaged one, or a folder in here.

        Raises:
            ConfigError: FG-UI-005, a folder elsewhere.
        """
        if _HUB.fullmatch(name) and not (self.root / name).exists():
            return name
        return self.name_of(self.inside(name))

    def data_files(self) -> list[dict[str, Any]]:
        """Files of rows: all in ``data/``, and those at the top that can be nothing else."""
        found = []
        folder = self.root / DATA
        places = [p for p in self.root.iterdir() if p.suffix.lower() not in _FREE_TEXT]
        places += sorted(folder.rglob("*"))[:_MOST_FILES] if folder.is_dir() else []
        for path in places:
            hidden = any(part.startswith(".") for part in path.relative_to(self.root).parts)
            if hidden or not readable(path) or not path.resolve().is_relative_to(self.root):
                continue
            try:
                facts = path.stat()
            except OSError:
                continue
            if path.is_file():
                values = {"size_bytes": facts.st_size, "modified": facts.st_mtime}
                found.append({"path": self.name_of(path), **values})
        return sorted(found, key=lambda file: -file["modified"])

    def model_folders(self) -> list[str]:
        """Folders with a model in them, at the top or one deeper."""
        found = [
            path.parent
            for depth in ("*", "*/*")
            for path in self.root.glob(f"{depth}/config.json")
            if not path.relative_to(self.root).parts[0].startswith((".", RUNS, EXPORTS))
        ]
        return sorted(self.name_of(path) for path in found if path.resolve() == path)

    def free_name(self, folder: str, stem: str, suffix: str = "") -> str:
        """``stem``, or ``stem-2``, ... so that nothing of that name is there."""
        number, name = 1, f"{stem}{suffix}"
        while os.path.lexists(self.root / folder / name):
            number += 1
            name = f"{stem}-{number}{suffix}"
        return name
