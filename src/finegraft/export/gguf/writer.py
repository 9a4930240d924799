"""Write one or several GGUF files in one pass over the weights.

What: ``write`` for models, ``write_file`` for a list of tensors. How: a file's header needs only
names, shapes and types, so the headers of all types come first; then each tensor is read once,
encoded in every type, and appended. Constraint: a file takes its name when it is whole and on the
disk, and several files take theirs together. Trade-off: both an old file and its replacement are on
the disk for a while.

Memory: one tensor as it is stored, and a few pieces of 4 million numbers for each thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from finegraft.core import paths
from finegraft.core.errors import ExportError, FinegraftError, StorageError
from finegraft.export._contract import Written
from finegraft.export.gguf import plan as planning
from finegraft.export.gguf import quantize, types
from finegraft.export.gguf.plan import Entry, Plan
from finegraft.export.gguf.source import open_source

logger = logging.getLogger(__name__)


def write(
    source: Any,
    path: str | Path,
    types: str | Sequence[str] = "q8_0",
    *,
    pre_tokenizer: str | None = None,
    pooling: str | None = None,
    threads: int | None = None,
    name: str | None = None,
) -> list[Written]:
    """Write a model as GGUF, in one or several types.

    Args:
        source: A model folder, or (model, tokenizer).
        path: A folder for files called ``<name>-Q8_0.gguf``; or, for one type, a file that ends
            in ``.gguf``.
        types: One or more of ``FILE_TYPES``.
        pre_tokenizer: llama.cpp's name for how a byte-level tokenizer splits; None: found out.
        pooling: For encoders, ``mean``, ``cls`` or ``last``.
        threads: For quantizing; None: as many as the process may use.
        name: Of the model, in the file and in file names; None: the folder's.

    Returns:
        What was written, in the order of ``types``.

    Raises:
        ExportError: FG-EXPORT-001 to FG-EXPORT-014, see docs/gguf.md; nothing is written then.
        StorageError: FG-EXPORT-011 too little space on the disk, FG-DISK-001 to FG-DISK-003.
    """
    wanted = _wanted(types)
    plan = planning.make(open_source(source), pre_tokenizer=pre_tokenizer, pooling=pooling)
    if name:
        plan = plan.renamed(name)
    kinds = {label: plan.kinds(kind) for label, kind in wanted.items()}
    for label in wanted:
        quantize.check(kinds[label], label)
    targets = _targets(Path(path), plan.source.name, wanted)
    _check_disk(plan, kinds, targets)
    with whole_files(list(targets.values())) as beside:
        _write_all(plan, wanted, kinds, beside, quantize.threads(threads))
    written = [Written(file, label, file.stat().st_size) for label, file in targets.items()]
    for record in written:
        logger.info("wrote %s (%.1f MB)", record.file, record.bytes / 1e6)
    return written


def problems(
    source: Any,
    path: str | Path,
    types: str | Sequence[str] = "q8_0",
    *,
    pre_tokenizer: str | None = None,
    pooling: str | None = None,
    **others: Any,
) -> list[Exception]:
    """Return what ``write`` would raise for these arguments, without writing anything.

    Args:
        source: As for ``write``, and so are the others.
        others: Further options of ``write``, which cannot fail.
    """
    found: list[Exception] = []
    wanted: dict[str, Any] = {}
    for name in [types] if isinstance(types, str) else types:
        try:
            wanted |= _wanted(name)
        except ExportError as error:
            found.append(error)
    try:
        plan = planning.make(open_source(source), pre_tokenizer=pre_tokenizer, pooling=pooling)
    except FinegraftError as error:
        return [*found, error]
    kinds = {label: plan.kinds(kind) for label, kind in wanted.items()}
    for label, of in kinds.items():
        try:
            quantize.check(of, label)
        except ExportError as error:
            found.append(error)
    try:
        if kinds:
            _check_disk(plan, kinds, _targets(Path(path), plan.source.name, wanted))
    except FinegraftError as error:
        found.append(error)
    return found


def _wanted(names: str | Sequence[str]) -> dict[str, types.FileType]:
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        types.find("")
    return dict(types.find(name) for name in listed)


def _targets(path: Path, name: str, wanted: dict[str, types.FileType]) -> dict[str, Path]:
    if path.suffix == ".gguf":
        if len(wanted) > 1:
            raise ExportError(
                "FG-EXPORT-014",
                f"one file name, {path.name}, for {len(wanted)} types: {', '.join(wanted)}",
                allowed="a folder, or one type",
                fix=f"pass {path.parent} and the files are named after their types",
            )
        return {label: path for label in wanted}
    return {label: path / f"{name}-{kind.label}.gguf" for label, kind in wanted.items()}


def _bytes(entry: Entry, kind: Type) -> int:
    rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
    return rows * types.row_bytes(kind, entry.shape[-1])


def _check_disk(plan: Plan, kinds: dict[str, dict[str, Type]], targets: dict[str, Path]) -> None:
    """Raise FG-EXPORT-011 where all files together would not fit."""
    folder = next(iter(targets.values())).parent
    paths.require_writable(folder)
    header = 64 * len(plan.vocabulary.tokens) + 1_000_000
    need = sum(_bytes(entry, of[entry.name]) for of in kinds.values() for entry in plan.entries)
    need += header * len(kinds)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StorageError(
            "FG-EXPORT-011",
            f"{', '.join(kinds)} take {need / 1e9:,.2f} GB, {folder} has {free / 1e9:,.2f} GB free",
            fix="write to another disk, or fewer or smaller types",
        )


@contextlib.contextmanager
def whole_files(final: list[Path]) -> Iterator[list[Path]]:
    """Yield names beside ``final`` that take their places together when the block ends well."""
    beside = [p.with_name(f".{p.name}.{uuid.uuid4().hex[:8]}.partial") for p in final]
    try:
        yield beside
        for new in beside:
            with open(new, "rb") as handle:
                os.fsync(handle.fileno())
        for new, old in zip(beside, final, strict=True):
            new.replace(old)
    except OSError as error:
        raise paths.storage_error(error, final[0]) from error
    finally:
        for new in beside:
            new.unlink(missing_ok=True)


def _write_all(
    plan: Plan,
    wanted: dict[str, types.FileType],
    kinds: dict[str, dict[str, Type]],
    files: list[Path],
    count: int,
) -> None:
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(count))
        writers = {}
        for (label, kind), file in zip(wanted.items(), files, strict=True):
            writer = GGUFWriter(file, plan.architecture.name)
            stack.callback(writer.close)
            plan.write_facts(writer, kind)
            start(writer, plan.entries, kinds[label])
            writers[label] = writer
        for entry in plan.entries:
            tensor = entry.read()
            for label, writer in writers.items():
                kind = kinds[label][entry.name]
                append(writer, entry, quantize.pieces(tensor, kind, pool, count + 1))
            del tensor


def start(writer: GGUFWriter, entries: list[Entry], kinds: dict[str, Type]) -> None:
    """Write the header of a file whose tensors will be ``entries``."""
    for entry in entries:
        kind = kinds[entry.name]
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), _bytes(entry, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = _file(writer)
    writer.write_padding(file, file.tell())


def append(writer: GGUFWriter, entry: Entry, pieces: Iterator[np.ndarray]) -> None:
    """Write the bytes of the next tensor."""
    file, count = _file(writer), 0
    for piece in pieces:
        count += file.write(piece.data)
    writer.write_padding(file, count)


def _file(writer: GGUFWriter) -> Any:
    assert writer.fout is not None
    return writer.fout[0]
