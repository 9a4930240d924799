"""A merged model in 4 bits of bitsandbytes: a quarter of the space, opened by transformers.

What: the folder that ``save_pretrained`` makes of a model loaded in 4 bits. How: the merged tensors
of ``_weights`` are quantized one at a time as the model is built from them. Constraint: what is
quantized is the merged weight, so the adapter's update is rounded with it. Trade-off: a training
that goes on from here goes on from rounded weights; merge into 16 bits for that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finegraft.core.errors import ConfigError
from finegraft.core.hardware import facts
from finegraft.core.paths import whole_folder
from finegraft.export import _verify, merged_16bit
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import open_origin
from finegraft.export._weights import Plain, find_dtype, open_plain
from finegraft.models import quantize

NAME = "merged_4bit"


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    kind = options.get("quant_type", "nf4")
    try:
        quantize.config_for(True, False, torch.bfloat16, kind)
    except ConfigError as error:
        return [error]
    rest = {k: v for k, v in options.items() if k != "quant_type"}
    return merged_16bit.problems(source, path, types, **rest)


def write(
    source: Any,
    path: str | Path,
    types: Sequence[str] = (),
    *,
    dtype: str | torch.dtype | None = None,
    quant_type: str = "nf4",
    max_shard_size: str | int = "5GB",
) -> list[Written]:
    """Write a merged folder in 4 bits.

    Args:
        source: A run, adapter or model folder, or (model, tokenizer).
        path: The folder; an older one there is replaced.
        types: None of them; the format has no variants.
        dtype: Of what is not quantized and of the products; None: the base's.
        quant_type: ``nf4`` or ``fp4``.
        max_shard_size: Largest weight file.

    Raises:
        ConfigError: FG-MODEL-015, ``quant_type``.
        ExportError: FG-EXPORT-030 dtype, FG-EXPORT-033 shard size, FG-EXPORT-035 an adapter that
            cannot be merged.
        StorageError: FG-EXPORT-034 too little space, FG-DISK-001 to FG-DISK-003.
    """
    limit = merged_16bit.shard_bytes(max_shard_size)
    half = find_dtype(dtype) if dtype else torch.bfloat16
    settings = quantize.config_for(True, False, half, quant_type)
    merged_16bit.check_mergeable(source)
    plain = open_plain(open_origin(source), dtype)
    final = Path(path)
    merged_16bit.check_disk(plain.bytes // 2, final)  # a head and an embedding stay in 16 bits
    with whole_folder(final) as folder:
        model = _quantized(plain, settings)
        model.save_pretrained(folder, max_shard_size=limit)
        plain.tokenizer.save_pretrained(folder)
        if plain.generation is not None:
            plain.generation.to_json_file(folder / "generation_config.json")
    return [Written(final, NAME, merged_16bit.folder_bytes(final))]


def _quantized(plain: Plain, settings: Any) -> Any:
    import transformers

    kind = getattr(transformers, plain.kind)
    model = kind.from_pretrained(
        None,
        config=copy.deepcopy(plain.config),
        state_dict=dict(plain.tensors),
        dtype=plain.dtype,
        quantization_config=settings,
        device_map={"": facts().device},
    )
    model.generation_config = transformers.GenerationConfig()  # written by ``write``, as it is
    return model


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Open the folder with transformers and compare what it says, see ``export._verify``."""
    return _verify.verify(file, source, mark=False).checks


FORMAT = Format(
    summary="a merged model in 4 bits of bitsandbytes, for transformers",
    variants={},
    options={
        "dtype": "of what is not quantized; as the base was published by default",
        "quant_type": "nf4 (default) or fp4",
        "max_shard_size": "largest weight file, 5GB by default",
    },
    problems=problems,
    write=write,
    verify=verify,
)
