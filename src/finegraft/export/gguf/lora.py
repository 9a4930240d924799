"""LoRA adapters as GGUF, to be loaded beside a base model.

What: ``write_lora`` writes a saved or trained LoRA adapter. How: the names and changes of the base
model's tensors, applied to the B matrices. Constraint: llama.cpp knows one alpha for all, which it
divides by each matrix's rank, and pairs A and B for matrices; everything else that peft can put
into an adapter is refused with its name, and can be merged instead.

llama.cpp scales by alpha / r. rsLoRA scales by alpha / sqrt(r), so alpha * sqrt(r) is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter

from finegraft.core import paths
from finegraft.core.errors import ExportError
from finegraft.export._contract import Written
from finegraft.export.gguf import architectures, quantize, types, writer
from finegraft.export.gguf.plan import Entry
from finegraft.models import _stream, load, swap

logger = logging.getLogger(__name__)

_MERGE = "merge it into the base (finegraft.adapters.merge_to_16bit) and export the merged model"
# Settings of peft's LoraConfig that llama.cpp has no counterpart for, and what they are.
_INEXPRESSIBLE = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks that differ between layers",
    "alpha_pattern": "alphas that differ between layers",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "rows of new or retrained tokens",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "repeated layers",
    "lora_bias": "biases of B",
    "alora_invocation_tokens": "activation by a phrase",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal adapters",
    "arrow_config": "routing between adapters",
}
# Starts that change the base; the saved halves mean nothing without it.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PARTS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}


def write_lora(
    adapter: Any, path: str | Path, *, base: Any = None, type: str = "f32", name: str | None = None
) -> Written:
    """Write a LoRA adapter as GGUF.

    Args:
        adapter: The folder of a saved adapter, or a peft model with one active adapter.
        path: The file; a folder gets ``<name>-LoRA-F32.gguf``.
        base: Folder or configuration of the base model; None: what the adapter names.
        type: ``f32``, ``f16`` or ``bf16``.
        name: Of the adapter; None: the folder's.

    Raises:
        ExportError: FG-EXPORT-015 a type that adapters are not stored in, FG-EXPORT-020 not a LoRA
            adapter, FG-EXPORT-021 a setting or FG-EXPORT-022 a tensor that llama.cpp cannot
            express, FG-EXPORT-023 no base model; FG-EXPORT-003 its family has no GGUF name.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    label, file_type = types.find(type)
    if file_type.base not in types.FLOATS:
        raise ExportError(
            "FG-EXPORT-015",
            f"an adapter in '{label}'",
            allowed="f32, f16, bf16",
            fix="f16 halves the file; quantize the base instead",
        )
    with opened(adapter, base) as (folder, config):
        if name is None and not isinstance(adapter, str | Path):
            name = adapter.active_adapters[0]
        return _write(folder, Path(path), config, file_type, label, name)


@contextlib.contextmanager
def opened(adapter: Any, base: Any = None) -> Iterator[tuple[Path, Any]]:
    """Run the block with a folder of the adapter and the base model's configuration.

    Raises:
        ExportError: FG-EXPORT-020 not a LoRA adapter, FG-EXPORT-023 no base model.
    """
    if isinstance(adapter, str | Path):
        yield Path(adapter), _base(Path(adapter), base)
        return
    if not hasattr(adapter, "peft_config"):
        raise _no_lora(f"a {adapter.__class__.__name__} without an adapter")
    active = adapter.active_adapters
    if len(active) != 1:
        raise _no_lora(f"{len(active)} active adapters")
    with tempfile.TemporaryDirectory() as temporary:
        adapter.save_pretrained(temporary, selected_adapters=active, save_embedding_layers=False)
        folder = Path(temporary) if active[0] == "default" else Path(temporary) / active[0]
        yield folder, swap.core(adapter).config


def read(folder: Path, base: Any) -> tuple[float, architectures.Architecture, list[Entry]]:
    """What the file of the adapter in ``folder`` must hold: alpha, architecture and tensors.

    Raises:
        ExportError: FG-EXPORT-020 to FG-EXPORT-022 and FG-EXPORT-003, as for ``write_lora``.
    """
    config = _config(folder)
    _check(config)
    architecture = architectures.find(base)
    tensors = _stream.open_files([folder / "adapter_model.safetensors"]) or {}
    return alpha(config), architecture, _entries(tensors, architecture, base, int(config["r"]))


def _no_lora(found: str) -> ExportError:
    return ExportError(
        "FG-EXPORT-020",
        f"{found} cannot be written as a GGUF adapter",
        allowed="the folder of a saved LoRA adapter, or a peft model with one",
        fix=_MERGE,
    )


def _base(folder: Path, base: Any) -> Any:
    """The configuration of the base model."""
    if base is not None and not isinstance(base, str | Path):
        return base
    named = base or _config(folder).get("base_model_name_or_path") or ""
    if not named or not Path(named).is_dir():
        raise ExportError(
            "FG-EXPORT-023",
            f"the base model of {folder} ('{named}') is not a folder",
            allowed="a folder with the base model's config.json",
            fix="pass base='FOLDER'; finegraft.local_model(name) finds a published model's",
        )
    return load.load_config(named)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise _no_lora(f"{folder}, without adapter_config.json and adapter_model.safetensors,")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found.get("peft_type") != "LORA":
        raise _no_lora(f"a {found.get('peft_type')} adapter")
    return found


def _write(
    folder: Path, path: Path, base: Any, file_type: types.FileType, label: str, name: str | None
) -> Written:
    strength, architecture, entries = read(folder, base)
    name = name or folder.resolve().name
    target = path if path.suffix == ".gguf" else path / f"{name}-LoRA-{file_type.label}.gguf"
    kinds = {
        entry.name: types.Type.F32 if len(entry.shape) < 2 else file_type.base for entry in entries
    }
    paths.require_writable(target.parent)
    with writer.whole_files([target]) as (beside,), ThreadPoolExecutor(1) as pool:
        out = GGUFWriter(beside, architecture.name)
        out.add_type(gguf.GGUFType.ADAPTER)
        out.add_name(name)
        out.add_string(gguf.Keys.Adapter.TYPE, "lora")
        out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, strength)
        writer.start(out, entries, kinds)
        for entry in entries:
            pieces = quantize.pieces(entry.read(), kinds[entry.name], pool, 1)
            writer.append(out, entry, pieces)
        out.close()
    logger.info("wrote %s (%.1f MB)", target, target.stat().st_size / 1e6)
    return Written(target, f"lora-{label}", target.stat().st_size)


def alpha(config: Mapping[str, Any]) -> float:
    """The number that llama.cpp divides by the rank to get peft's scale."""
    given = float(config["lora_alpha"])
    return given * math.sqrt(config["r"]) if config.get("use_rslora") else given


def _check(config: Mapping[str, Any]) -> None:
    """Raises ExportError FG-EXPORT-021."""
    start = config.get("init_lora_weights")
    reasons = [text for key, text in _INEXPRESSIBLE.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"trained biases (bias='{config['bias']}')")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        reasons.append(f"a start that changes the base (init_lora_weights='{start}')")
    if reasons:
        raise ExportError(
            "FG-EXPORT-021",
            f"llama.cpp cannot express this adapter: {'; '.join(reasons)}",
            allowed="plain LoRA and rsLoRA with one rank and one alpha",
            fix=_MERGE,
        )


def _entries(
    tensors: Mapping[str, Any], architecture: architectures.Architecture, base: Any, rank: int
) -> list[Entry]:
    found: dict[str, Entry] = {}
    for name, value in tensors.items():
        part = next((end for end in _PARTS if name.endswith(end)), None)
        module = name.removeprefix("base_model.model.").removesuffix(part or "")
        if part is None:
            raise _no_place(name, "it is neither A nor B of a matrix")
        place = architectures.place(architecture, f"{module}.weight", base)
        if place is None or (place == "output.weight" and base.tie_word_embeddings):
            raise _no_place(name, "the file of the base has no such tensor")
        if value.shape[0 if part == ".lora_A.weight" else 1] != rank:
            raise _no_place(name, f"its rank is not {rank}")
        kind = _PARTS[part]
        found[f"{place}.{kind}"] = Entry(
            f"{place}.{kind}", tuple(value.shape), _reader(value, place, kind, architecture, base)
        )
    _check_pairs(found)
    return list(found.values())


def _reader(
    value: Any, place: str, kind: str, architecture: architectures.Architecture, base: Any
) -> Any:
    def read() -> torch.Tensor:
        tensor = value[...]
        # rows of B are rows of the weight; A's are ranks
        return architecture.change(place, tensor, base) if kind == "lora_b" else tensor

    return read


def _check_pairs(found: Mapping[str, Entry]) -> None:
    halves = {name: name[:-1] + ("b" if name.endswith("a") else "a") for name in found}
    lonely = [name for name, other in halves.items() if other not in found]
    if lonely or not found:
        raise _no_place(lonely[0] if lonely else "the adapter", "its other half is missing")


def _no_place(name: str, reason: str) -> ExportError:
    return ExportError(
        "FG-EXPORT-022",
        f"llama.cpp cannot express {name}: {reason}",
        allowed="LoRA on the linear layers of attention and MLP, or on a head of its own",
        fix=_MERGE,
    )
