"""The adapter alone: a folder of peft's beside which the base is needed.

What: weights and configuration of the adapter, tokenizer, template, and ``finegraft.json``, which
knows the base. How: a saved adapter is copied, one in memory is saved. Constraint: any method's
adapter, mergeable or not. Trade-off: a hundredth of the space, and the base must be had.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finegraft import opening
from finegraft.core.errors import ExportError
from finegraft.core.paths import require_writable, whole_folder
from finegraft.export import _verify
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import Origin, open_origin

NAME = "lora"
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
_LEFT_OUT = ("trainer_state.json", "verification.json")


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    try:
        require_adapter(open_origin(source))
    except ExportError as error:
        return [error]
    return []


def require_adapter(origin: Origin) -> None:
    """Raises ExportError FG-EXPORT-032."""
    if origin.in_memory is not None:
        found = hasattr(origin.in_memory, "peft_config")
    else:
        found = origin.located.kind == "adapter"
    if not found:
        raise ExportError(
            "FG-EXPORT-032",
            f"{origin.name} has no adapter, every weight of it is its own",
            allowed="a run or model with an adapter",
            fix="merged-16bit (save_method='merged_16bit') writes the whole model",
        )


def write(source: Any, path: str | Path, types: Sequence[str] = ()) -> list[Written]:
    """Write an adapter folder.

    Args:
        source: A run or adapter folder, or (model, tokenizer).
        path: The folder; an older one there is replaced.
        types: None of them; the format has no variants.

    Raises:
        ExportError: FG-EXPORT-032, there is no adapter.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    origin = open_origin(source)
    require_adapter(origin)
    final = Path(path)
    require_writable(final.absolute().parent)
    with whole_folder(final) as folder:
        if origin.in_memory is None:
            _copy(origin.located.path, folder)
        else:
            _save(origin.in_memory, folder)
            origin.tokenizer.save_pretrained(folder)
            opening.write_note(origin.in_memory, folder)
    return [Written(final, NAME, sum(p.stat().st_size for p in final.rglob("*") if p.is_file()))]


def _copy(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _LEFT_OUT:
            shutil.copy2(file, folder / file.name)


def _save(model: Any, folder: Path) -> None:
    """Save the active adapter; peft puts any but ``default`` into a folder of its name."""
    active = model.active_adapters[0]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        model.save_pretrained(name, selected_adapters=[active])
        _copy(Path(name) if active == "default" else Path(name) / active, folder)


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Open the folder with peft and compare what it says, see ``export._verify``."""
    return _verify.verify(file, source, mark=False).checks


FORMAT = Format(
    summary="the adapter alone, for peft, transformers and vLLM beside the base",
    variants={},
    options={},
    problems=problems,
    write=write,
    verify=verify,
)
