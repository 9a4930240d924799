"""A LoRA as a GGUF file, which llama.cpp and Ollama load beside the GGUF file of its base.

What: one file of a hundredth of the model's size. How: ``gguf.write_lora`` writes it; to verify it,
llama.cpp loads it beside the base, whose GGUF file is made for that moment, or is the one that a
Modelfile names. Constraint: what llama.cpp cannot express of an adapter is refused before anything
is written. Trade-off: verifying takes the disk space of the base in 16 or 32 bits for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError
from finegraft.export import _verify, lora
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import Origin, open_origin

VARIANTS = {
    "f32": "as it was trained",
    "f16": "half the size",
    "bf16": "half the size, coarser than f16",
}


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    try:
        check(open_origin(source))
    except FinegraftError as error:
        return [error]
    return []


def check(origin: Origin) -> None:
    """Prove that the adapter of ``origin`` can be written.

    Raises:
        ExportError: FG-EXPORT-032 there is no adapter; those of ``gguf.write_lora``.
    """
    from finegraft.export.gguf import lora as writer

    lora.require_adapter(origin)
    with writer.opened(adapter_of(origin), base_config(origin)) as (folder, config):
        writer.read(folder, config)


def adapter_of(origin: Origin) -> Any:
    """The folder or the model that carries the adapter."""
    return origin.in_memory if origin.in_memory is not None else origin.located.path


def base_config(origin: Origin) -> Any:
    """Configuration of the base; None for a model in memory, which brings its own."""
    if origin.in_memory is not None:
        return None
    from finegraft.models import load

    return load.load_config(origin.base_origin.located.path)


def write(source: Any, path: str | Path, types: Sequence[str] = ("f32",)) -> list[Written]:
    """Write the adapter in one or several types.

    Args:
        source: A run or adapter folder, or (model, tokenizer).
        path: The folder of the files.
        types: Of ``VARIANTS``.

    Raises:
        ExportError: FG-EXPORT-032 there is no adapter; those of ``gguf.write_lora``.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    from finegraft.export import gguf

    origin = open_origin(source)
    lora.require_adapter(origin)
    done = []
    for kind in types:
        record = gguf.write_lora(
            adapter_of(origin), path, base=base_config(origin), type=kind, name=origin.called
        )
        done.append(Written(record.file, kind, record.bytes))
    return done


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Load it with llama.cpp beside its base and compare, see ``export._verify``."""
    return list(_verify.verify(file, source, mark=False).checks)


FORMAT = Format(
    summary="a LoRA as GGUF, for llama.cpp beside the GGUF of its base",
    variants=VARIANTS,
    options={},
    problems=problems,
    write=write,
    verify=verify,
)
