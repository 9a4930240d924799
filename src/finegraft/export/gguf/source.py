"""Where weights, configuration and tokenizer of an export come from.

What: ``open_source`` takes a model folder or a pair (model, tokenizer) and gives both the same
face. How: a folder's tensors are read one at a time when they are asked for; a model's are the ones
in memory. Constraint: plain weights only. An unmerged adapter or quantized layers are refused here,
because a file made from them would not be what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finegraft.core.errors import ExportError, ModelError
from finegraft.models import _stream, load, quantize, swap, weights

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_MERGE = "finegraft.adapters.merge_to_16bit(model).model gives a plain model"


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        config: Of the language model.
        tokenizer: From transformers.
        tensors: By name; ``tensors[name][...]`` gives the values.
        name: What the model is called.
        folder: Where it was read from, None for a model in memory.
        ends: Ids that end an answer.
    """

    config: Any
    tokenizer: Any
    tensors: Mapping[str, Any]
    name: str
    folder: Path | None
    ends: tuple[int, ...] = ()


def open_source(source: Any) -> Source:
    """Return what an export needs to know of ``source``.

    Args:
        source: A model folder, or (model, tokenizer).

    Raises:
        ExportError: FG-EXPORT-004 an adapter, FG-EXPORT-005 quantized weights, FG-EXPORT-012
            neither a folder nor a pair.
        ModelError: FG-MODEL-005 or FG-MODEL-008, a folder that cannot be read.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], nn.Module):
        return _from_model(*source)
    if isinstance(source, str | Path) and Path(source).is_dir():
        return _from_folder(Path(source))
    raise ExportError(
        "FG-EXPORT-012",
        f"{source!r} is neither a model folder nor a pair (model, tokenizer)"
        if isinstance(source, str | Path)
        else f"a {type(source).__name__} is neither a model folder nor a pair (model, tokenizer)",
        allowed="a folder with config.json and safetensors files, or (model, tokenizer)",
        fix="finegraft.local_model(name) finds the folder of a published model",
    )


def _unmerged(found: str) -> ExportError:
    return ExportError(
        "FG-EXPORT-004",
        f"{found} carries an adapter that is not merged",
        allowed="a plain model; write_lora for the adapter alone",
        fix=_MERGE,
    )


def _quantized(found: str) -> ExportError:
    return ExportError(
        "FG-EXPORT-005",
        f"{found} holds quantized weights",
        allowed="16-bit or 32-bit weights",
        fix=_MERGE + "; without an adapter load it with load_in_4bit=False",
    )


def _ends(settings: Any) -> tuple[int, ...]:
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _from_folder(folder: Path) -> Source:
    from transformers import GenerationConfig

    if (folder / "adapter_config.json").is_file():
        raise _unmerged(str(folder))
    config = load.load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise _quantized(str(folder))
    files = weights.check(folder)
    tensors: Mapping[str, Any] | None = _stream.open_files(files)
    if tensors is None:
        tensors = _pickled(files)
    settings: Any = config
    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(folder)
    return Source(
        config=config,
        tokenizer=load.load_tokenizer(folder),
        tensors=_tied(dict(tensors), config, same=True),
        name=folder.resolve().name,
        folder=folder,
        ends=_ends(settings),
    )


def _pickled(files: list[Path]) -> dict[str, torch.Tensor]:
    if any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            "FG-MODEL-005",
            f"{files[0].parent} holds tensors of a dtype that cannot be exported",
            allowed="float32, float16 or bfloat16",
            fix="load and save the model with another dtype",
        )
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found |= torch.load(path, map_location="cpu", weights_only=True)
    return found


def _from_model(model: nn.Module, tokenizer: Any) -> Source:
    if hasattr(model, "peft_config"):
        raise _unmerged(f"the {type(swap.core(model)).__name__}")
    if quantize.quantized_layers(model) or getattr(model, "is_quantized", False):
        raise _quantized(f"the {type(model).__name__}")
    core: Any = swap.core(model)
    state = {name: value.detach() for name, value in core.state_dict().items()}
    head = state.get(HEAD)
    inputs = core.get_input_embeddings().weight
    same = head is None or head.data_ptr() == inputs.data_ptr()
    config = core.config
    return Source(
        config=config,
        tokenizer=tokenizer,
        tensors=_tied(state, config, same=same),
        name=Path(getattr(config, "name_or_path", "") or type(core).__name__).name,
        folder=None,
        ends=_ends(getattr(core, "generation_config", None) or config),
    )


def _tied(tensors: dict[str, Any], config: Any, *, same: bool) -> dict[str, Any]:
    """Leave a head out that is the embedding; one that has been untied in training stays."""
    if getattr(config, "tie_word_embeddings", False) and same:
        tensors.pop(HEAD, None)
    return tensors
