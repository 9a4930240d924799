"""Files from the package registry that the user's pip is set up for, checked before use.

What: ``download`` fetches one pinned wheel or sdist and compares its full sha256. How: ``pip
download --no-deps``, so that mirrors, proxies and certificates are the user's own. Constraint:
nothing of a file is kept, and no code of an sdist is run, before its checksum was compared; pip
itself runs an sdist's build script for its metadata, so it is given the checksum as ``--hash``.
Trade-off: for that metadata pip also fetches the sdist's build tools.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

Kind = Literal["wheel", "sdist"]
_ONLY = {"wheel": "--only-binary=:all:", "sdist": "--no-binary=:all:"}
_ENDINGS = {"wheel": (".whl",), "sdist": (".tar.gz", ".zip")}
_GOT = re.compile(r"^\s*Got\s+([0-9a-f]{64})\s*$", re.MULTILINE)


class Unreachable(Exception):
    """The registry did not give the file; the text says why."""


class WrongChecksum(Exception):
    """The registry gave another file than the one that was asked for.

    Attributes:
        file: Its name, or the requirement where pip refused the file before it had one.
        found: Its sha256.
    """

    def __init__(self, file: str, found: str):
        super().__init__(f"{file} has sha256 {found}")
        self.file = file
        self.found = found


def pip() -> list[str]:
    """Return the command that runs a pip.

    Raises:
        Unreachable: There is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    # environments made by uv hold no pip; any pip will do, since the files fit every Python
    found = shutil.which("pip") or shutil.which("pip3")
    if found is None:
        raise Unreachable("there is no pip here (python -m ensurepip installs it)")
    return [found]


def download(requirement: str, sha256: str, folder: Path, kind: Kind = "wheel") -> Path:
    """Fetch one file into ``folder`` and return its path.

    Args:
        requirement: ``name==version``.
        sha256: All 64 hexadecimal digits.
        folder: Exists and is empty.
        kind: Which of the version's files.

    Raises:
        Unreachable: pip found no registry, or the registry has no such file.
        WrongChecksum: The file is another one; it was removed.
    """
    wanted = requirement
    if kind == "sdist":
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        wanted = f"--requirement={pinned}"
    try:
        file = _fetched(requirement, wanted, folder, kind)
    finally:
        (folder / "requirements.txt").unlink(missing_ok=True)
    with open(file, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        file.unlink()
        raise WrongChecksum(file.name, found)
    return file


def _fetched(requirement: str, wanted: str, folder: Path, kind: Kind) -> Path:
    """Run pip and return the one file that it left."""
    done = subprocess.run(
        [
            *pip(),
            "download",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--retries=2",
            "--no-deps",
            _ONLY[kind],
            "--dest",
            str(folder),
            wanted,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    files = [path for path in folder.iterdir() if path.name.endswith(_ENDINGS[kind])]
    if done.returncode == 0 and len(files) == 1:
        return files[0]
    refused = _GOT.search(done.stderr)
    if refused is not None:
        raise WrongChecksum(requirement, refused[1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise Unreachable(lines[-1] if lines else f"pip ended with {done.returncode}")
