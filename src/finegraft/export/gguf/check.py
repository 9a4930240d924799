"""Read a GGUF file back and compare it with the model that it was made from.

What: ``verify`` returns one check each for names and shapes, for the values of all tensors, for the
facts of the configuration, and for the tokenizer. How: the ``gguf`` package reads the file and
dequantizes; the plan of the source says what must be there. Constraint: one tensor at a time.
Trade-off: this proves that the file holds the model; that llama.cpp computes the same from it
needs llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter

from finegraft.export._contract import Check
from finegraft.export.gguf import lora, types
from finegraft.export.gguf import plan as planning
from finegraft.export.gguf.plan import Plan
from finegraft.export.gguf.source import open_source

# Largest error of a tensor relative to its norm. Normal weights measure 60% to 80% of these.
_TOLERANCE = {
    Type.F32: 1e-6,
    Type.F16: 1e-3,
    Type.BF16: 4e-3,
    Type.Q8_0: 0.01,
    Type.Q6_K: 0.03,
    Type.Q5_0: 0.08,
    Type.Q5_1: 0.08,
    Type.Q5_K: 0.06,
    Type.Q4_0: 0.16,
    Type.Q4_1: 0.16,
    Type.Q4_K: 0.12,
    Type.Q3_K: 0.25,
    Type.Q2_K: 0.5,
}


def verify(
    source: Any,
    file: str | Path,
    *,
    pre_tokenizer: str | None = None,
    pooling: str | None = None,
    name: str | None = None,
) -> list[Check]:
    """Compare ``file`` with the model that it was made from.

    Args:
        source: A model folder, or (model, tokenizer), as for ``write``.
        file: What ``write`` wrote.
        pre_tokenizer: As for ``write``.
        pooling: As for ``write``.
        name: As for ``write``.

    Returns:
        Checks ``tensors``, ``weights``, ``facts`` and ``tokenizer``; the file is good if all are.

    Raises:
        ExportError: As for ``write``, for a source that cannot be exported.
    """
    plan = planning.make(open_source(source), pre_tokenizer=pre_tokenizer, pooling=pooling)
    plan = plan.renamed(name) if name else plan
    reader = GGUFReader(file)
    number = reader.get_field("general.file_type")
    label = number.contents() if number else -1
    file_type = next((t for t in types.FILE_TYPES.values() if t.id == label), None)
    if file_type is None:
        return [Check("tensors", float("inf"), 0, False, f"file type {label} is not ours")]
    missing, weights = _tensors(plan, reader, file_type)
    facts, tokens = _keys(plan, reader, file_type)
    return [missing, weights, facts, tokens]


def verify_lora(adapter: Any, file: str | Path, *, base: Any = None) -> list[Check]:
    """Compare ``file`` with the adapter that it was made from.

    Args:
        adapter: A folder or a peft model, as for ``write_lora``, and so is ``base``.
        file: What ``write_lora`` wrote.

    Returns:
        Checks ``tensors``, ``weights`` and ``facts``; the file is good if all are.

    Raises:
        ExportError: As for ``write_lora``, for an adapter that cannot be written.
    """
    reader = GGUFReader(file)
    there = {tensor.name: tensor for tensor in reader.tensors}
    with lora.opened(adapter, base) as (folder, config):
        alpha, architecture, entries = lora.read(folder, config)
        wrong = sorted(there.keys() ^ {entry.name for entry in entries})
        worst, place = 0.0, None
        for entry in entries:
            found = there.get(entry.name)
            shape = found is not None and tuple(int(n) for n in reversed(found.shape))
            if found is None or shape != entry.shape:
                wrong += [entry.name] if found is not None else []
                continue
            error = _error(entry.read().float().numpy(), found)
            if not error <= worst:
                worst, place = error, entry.name
    wanted = {
        "general.type": "adapter",
        "general.architecture": architecture.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    facts = _check("facts", [key for key, value in wanted.items() if not _same(reader, key, value)])
    return [_names(wrong), _values(worst, place), facts]


def rows_of(file: str | Path, name: str, ids: Sequence[int]) -> tuple[torch.Tensor | None, float]:
    """Rows [n, d] of the tensor ``name`` in ``file``, None where it has no such rows.

    Returns:
        The rows, and the relative error that their type may have.
    """
    tensor = next((t for t in GGUFReader(file).tensors if t.name == name), None)
    if tensor is None or max(ids) >= int(tensor.shape[1]):
        return None, 0.0
    rows = gguf.quants.dequantize(tensor.data[list(ids)], tensor.tensor_type)
    values = torch.tensor(np.asarray(rows, dtype=np.float32))
    return values, _TOLERANCE[tensor.tensor_type]


def _tensors(plan: Plan, reader: GGUFReader, file_type: types.FileType) -> tuple[Check, Check]:
    """One check of names, shapes and types, one of the values."""
    there = {tensor.name: tensor for tensor in reader.tensors}
    kinds = plan.kinds(file_type)
    wrong = sorted(there.keys() ^ kinds.keys())
    worst, place = 0.0, None
    for entry in plan.entries:
        found = there.get(entry.name)
        if found is None:
            continue
        shape = tuple(int(n) for n in reversed(found.shape))
        if shape != entry.shape or found.tensor_type != kinds[entry.name]:
            wrong.append(entry.name)
            continue
        error = _error(entry.read().float().numpy(), found)
        if not error <= worst:  # also where it is not a number
            worst, place = error, entry.name
    return _names(wrong), _values(worst, place)


def _names(wrong: list[str]) -> Check:
    told = f"missing, left over, or of another shape or type: {', '.join(wrong[:5])}"
    return Check("tensors", len(wrong), 0, not wrong, told if wrong else None)


def _values(worst: float, place: str | None) -> Check:
    cause = None if worst <= 1 else f"{place} holds other values than the model"
    return Check("weights", worst, 1.0, worst <= 1, cause)


def _error(wanted: np.ndarray, found: Any) -> float:
    """Relative error as a share of what the type allows."""
    values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(wanted.shape)
    norm = float(np.linalg.norm(wanted)) or 1.0
    return float(np.linalg.norm(values - wanted)) / norm / _TOLERANCE[found.tensor_type]


def _keys(plan: Plan, reader: GGUFReader, file_type: types.FileType) -> tuple[Check, Check]:
    """One check of the facts and one of the tokenizer's keys."""
    writer = GGUFWriter(None, plan.architecture.name)
    plan.write_facts(writer, file_type)
    wanted = {key: item.value for key, item in writer.kv_data[0].items()}
    wrong = [key for key, value in wanted.items() if not _same(reader, key, value)]
    there = {key for key in reader.fields if not key.startswith("GGUF.")}
    wrong += sorted(there - wanted.keys())
    tokens = [key for key in wrong if key.startswith("tokenizer.")]
    facts = [key for key in wrong if not key.startswith("tokenizer.")]
    return _check("facts", facts), _check("tokenizer", tokens)


def _check(name: str, wrong: list[str]) -> Check:
    cause = f"other values than the model's: {', '.join(wrong)}" if wrong else None
    return Check(name, len(wrong), 0, not wrong, cause)


def _same(reader: GGUFReader, key: str, value: Any) -> bool:
    field = reader.get_field(key)
    if field is None:
        return False
    found = field.contents()
    if isinstance(value, float):
        return bool(np.float32(value) == np.float32(found))
    if isinstance(value, list | tuple) and value and isinstance(value[0], float):
        return bool(np.array_equal(np.float32(value), np.float32(found)))
    return bool(list(value) == list(found) if isinstance(value, list | tuple) else value == found)
