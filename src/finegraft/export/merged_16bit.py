"""A merged model in 16 bits: one folder that transformers, vLLM and everything else opens.

What: weights, configuration, generation settings, tokenizer and chat template. How: tensors are
computed one at a time and written shard by shard, see ``_weights``. Constraint: the need of disk is
known first, the folder appears when it is whole. Trade-off: while an older folder is replaced both
are on the disk.

Memory: above the model, if one is loaded, one shard and one layer.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from finegraft import adapters
from finegraft.core.errors import ExportError, FinegraftError, StorageError
from finegraft.core.paths import require_writable, whole_folder
from finegraft.export import _verify
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import open_origin
from finegraft.export._weights import HALVES, Lazy, Plain, find_dtype, open_plain
from finegraft.models.locate import ADAPTER_CONFIG

NAME = "merged_16bit"
_SMALL_BYTES = 30_000_000  # tokenizer and configuration, generously
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    try:
        find_dtype(options.get("dtype"))
        shard_bytes(options.get("max_shard_size", "5GB"))
        check_mergeable(source)
    except FinegraftError as error:
        return [error]
    return []


def check_mergeable(source: Any) -> None:
    """Prove that an export of merged weights can be made of ``source``.

    Raises:
        ExportError: FG-EXPORT-035, an adapter that is not an update of weights.
    """
    origin = open_origin(source)
    if origin.in_memory is not None:
        method = adapters.method_of(origin.in_memory)
    elif origin.located.kind == "adapter":
        values = json.loads((origin.located.path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name = adapters.name_of(SimpleNamespace(peft_type=values.get("peft_type")))
        method = adapters.METHODS.get(name) if name else None
    else:
        method = None
    if method is not None and method.not_mergeable:
        raise ExportError(
            "FG-EXPORT-035",
            f"the adapter of {origin.name} cannot be merged: {method.not_mergeable}",
            allowed="adapters that change weights: lora, ia3, bitfit, ...",
            fix="lora (save_method='lora') writes the adapter alone, whatever its method",
        )


def write(
    source: Any,
    path: str | Path,
    types: Sequence[str] = (),
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> list[Written]:
    """Write a merged folder.

    Args:
        source: A run, adapter or model folder, or (model, tokenizer).
        path: The folder; an older one there is replaced.
        types: None of them; the format has no variants.
        dtype: ``bfloat16`` or ``float16`` (or ``float32``); None: what the base was published in.
        max_shard_size: Largest weight file, ``5GB`` say.

    Raises:
        ExportError: FG-EXPORT-030 dtype, FG-EXPORT-033 shard size, FG-EXPORT-035 an adapter that
            cannot be merged.
        StorageError: FG-EXPORT-034 too little space, FG-DISK-001 to FG-DISK-003.
    """
    limit = shard_bytes(max_shard_size)
    check_mergeable(source)
    plain = open_plain(open_origin(source), dtype)
    final = Path(path)
    check_disk(plain.bytes, final)
    with whole_folder(final) as folder:
        write_weights(plain.tensors, folder, limit, plain.dtype)
        write_rest(plain, folder)
    return [Written(final, NAME, folder_bytes(final))]


def write_rest(plain: Plain, folder: Path) -> None:
    """Configuration, generation settings, tokenizer and template."""
    plain.config.save_pretrained(folder)
    if plain.generation is not None:
        # not save_pretrained, which refuses settings that models are published with
        plain.generation.to_json_file(folder / "generation_config.json")
    plain.tokenizer.save_pretrained(folder)


def shard_bytes(size: str | int) -> int:
    """Read ``5GB``.

    Raises:
        ExportError: FG-EXPORT-033, not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", str(size).strip(), re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise ExportError(
            "FG-EXPORT-033",
            f"max_shard_size is {size!r}",
            allowed="bytes, or a number with KB, MB or GB",
            fix="max_shard_size='5GB'",
        )
    return count


def check_disk(need: int, final: Path) -> None:
    """Prove that ``need`` bytes and the small files fit beside ``final``.

    Raises:
        StorageError: FG-EXPORT-034, too little space; FG-DISK-002, a place that is not writable.
    """
    require_writable(final.absolute().parent)
    need, free = need + _SMALL_BYTES, shutil.disk_usage(final.absolute().parent).free
    if need > free:
        raise StorageError(
            "FG-EXPORT-034",
            f"{final} takes {need / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there",
            fix="free some space, or --output with a folder on another disk",
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of every file in ``folder``."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def write_weights(
    tensors: Mapping[str, Lazy], folder: Path, limit: int, dtype: torch.dtype
) -> None:
    """Write safetensors shards of at most ``limit`` bytes, and their index if there are several."""
    shards = list(_shards(tensors, limit, dtype))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        held = {name: tensors[name][...].contiguous().cpu() for name in names}
        save_file(held, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        del held
    if len(shards) > 1:
        total = sum(math.prod(t.shape) for t in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Mapping[str, Lazy], limit: int, dtype: torch.dtype) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * dtype.itemsize
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Open the folder with transformers and compare what it says, see ``export._verify``."""
    return _verify.verify(file, source, mark=False).checks


FORMAT = Format(
    summary="a merged model in 16 bits, for transformers, vLLM and everything else",
    variants={},
    options={
        "dtype": f"{', '.join(HALVES)} or float32; as the base was published by default",
        "max_shard_size": "largest weight file, 5GB by default",
    },
    problems=problems,
    write=write,
    verify=verify,
)
