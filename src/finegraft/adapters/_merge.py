"""Merge an adapter into 16-bit weights, whatever precision it was trained on.

What: ``merge_to_16bit`` returns a plain transformers model and says which base weights are in it.
How: a new model is filled from the trained one, tensor by tensor; layers that were quantized take
the original weights where their folder still holds them, else their dequantised ones; then peft
merges the adapter as it would into any model. Constraint: the trained model is left as it is, and
can go on training. Trade-off: both models are in memory at once. Original weights differ from
what the adapter was trained against by the error of quantisation; they give what the base's
authors published plus the update, which most often answers slightly better.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from finegraft.adapters import _methods, _plugin, _tokens
from finegraft.core.errors import AdapterError, ModelError
from finegraft.models import _stream, quantize, swap, weights

logger = logging.getLogger(__name__)

ORIGINAL, DEQUANTIZED, LOADED = "original", "dequantized", "loaded"
_HALF = (torch.bfloat16, torch.float16)
# Relative error that 4-bit rounding makes is about 0.09 (NF4) or 0.13 (FP4); another model's: 1.4.
_SAME = 0.4
# Steps of a module path that peft's wrappers add.
_WRAPPERS = {"base_layer", "original_module", "token_adapter"}


@dataclass(frozen=True)
class Merged:
    """A merged model and what it was made of.

    Attributes:
        model: Plain transformers, no adapter, nothing quantized, in eval mode.
        base: ``original``: the 16-bit weights in ``folder``; ``dequantized``: what the quantized
            layers held; ``loaded``: the base was never quantized.
        folder: Where original weights were read from.
        reason: Why original weights were not used, or None.
    """

    model: Any
    base: Literal["original", "dequantized", "loaded"]
    folder: Path | None
    reason: str | None


def merge_to_16bit(
    model: nn.Module,
    *,
    base: str | Path | Literal["dequantized"] | None = None,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Return a new plain model with the active adapter merged in.

    Args:
        model: A peft model; not changed.
        base: A folder with the original weights, or ``dequantized`` to use what the quantized
            layers hold; None: the folder that the base was loaded from if it has them.
        dtype: Of the result; None: what the base was quantized from or loaded in.

    Raises:
        AdapterError: FG-ADAPT-070 no adapter, FG-ADAPT-071 a method that cannot be merged,
            FG-ADAPT-072 ``base`` does not hold the original weights, FG-ADAPT-073 several active
            adapters, FG-ADAPT-075 a model that lacks weights of its class.
    """
    check_mergeable(model)
    core = swap.core(model)
    found = quantize.quantized_layers(core) if getattr(core, "is_quantized", False) else {}
    layers = {_plain_name(name): module for name, module in found.items()}
    folder, reason = None, None
    stored: dict[str, Any] = {}
    if layers and base != "dequantized":
        folder = Path(base or core.config.name_or_path)
        stored, reason = original_weights(folder, layers)
        if reason and base:
            raise AdapterError(
                "FG-ADAPT-072",
                f"{folder} does not hold the original weights: {reason}",
                allowed="the 16-bit or 32-bit model that was quantized",
                fix="pass its folder, or base='dequantized'",
            )
    dtype = dtype or _dtype_of(core, layers)
    plain = _plain_model(core, layers, stored, dtype)
    merged = _merge_into(plain, model)
    kind: Any = LOADED if not layers else ORIGINAL if stored else DEQUANTIZED
    logger.info(
        "merged into %s",
        {
            LOADED: "the weights as they were loaded",
            ORIGINAL: f"the original weights in {folder}",
            DEQUANTIZED: f"dequantized weights ({reason or 'as asked for'})",
        }[kind],
    )
    return Merged(merged, kind, folder if kind == ORIGINAL else None, reason)


def check_mergeable(model: nn.Module) -> None:
    """Raises AdapterError FG-ADAPT-070, FG-ADAPT-071 or FG-ADAPT-073."""
    if not hasattr(model, "peft_config"):
        raise AdapterError(
            "FG-ADAPT-070",
            f"merge_to_16bit got a {type(model).__name__} without an adapter",
            allowed="a model that get_peft_model or from_pretrained gave an adapter",
            fix="open the adapter's folder",
        )
    active: Any = model.active_adapters
    if len(active) != 1:
        raise AdapterError(
            "FG-ADAPT-073",
            f"{len(active)} adapters are active: {', '.join(active)}",
            allowed="one active adapter",
            fix="model.set_adapter(name) chooses one; combine several before merging",
        )
    method = _methods.method_of(model)
    if method is not None and method.not_mergeable:
        raise AdapterError(
            "FG-ADAPT-071",
            f"this adapter cannot be merged: {method.not_mergeable}",
            allowed="methods that change weights: lora, ia3, bitfit, ...",
            fix="save the adapter and load it beside its base",
        )


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _dtype_of(core: Any, layers: dict[str, Any]) -> torch.dtype:
    state = next((getattr(m.weight, "quant_state", None) for m in layers.values()), None)
    if state is not None:
        return state.dtype
    wanted = getattr(core.config, "dtype", None) if layers else core.dtype
    return wanted if isinstance(wanted, torch.dtype) else torch.bfloat16


def original_weights(folder: Path, layers: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Unread original weights by parameter name; or nothing, and why."""
    if not folder.is_dir():
        return {}, f"{folder} is not a folder"
    try:
        stored = _stream.open_files(weights.check(folder))
    except ModelError as error:
        return {}, error.found
    if stored is None:
        return {}, f"{folder} holds no safetensors files"
    found = {}
    for name, layer in layers.items():
        key = f"{name}.weight"
        short = key.partition(".")[2]  # checkpoints of a bare decoder or encoder lack its prefix
        entry = stored.get(key) or stored.get(short)
        if entry is None:
            return {}, f"{key} is not in {folder}"
        turned = tuple(reversed(_shape(layer)))
        if entry.kind not in ("F32", "F16", "BF16") or entry.shape not in (_shape(layer), turned):
            return {}, f"{key} in {folder} is {entry.kind} {entry.shape}"
        found[key] = entry
    name, layer = next(iter(layers.items()))
    there, here = found[f"{name}.weight"][...].float(), quantize.dense_weight(layer, torch.float32)
    if there.shape != here.shape or (there - here.cpu()).norm() > _SAME * there.norm():
        return {}, f"{name}.weight in {folder} is of another model"
    return found, None


def _shape(layer: Any) -> tuple[int, ...]:
    return (layer.out_features, layer.in_features)


@dataclass(frozen=True)
class _Held:
    """A tensor of the trained model, made dense or copied when it is read."""

    source: Any
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(self.source, nn.Module):
            return quantize.dense_weight(self.source, self.dtype)[index]
        return self.source.detach().clone()[index]

    def get_shape(self) -> list[int]:
        return list(self[...].shape)


def _plain_model(
    core: Any, layers: dict[str, Any], stored: dict[str, Any], dtype: torch.dtype
) -> Any:
    """A new model of the stock class with the base weights of ``core``, nothing quantized."""
    kind: Any = swap.stock_class(core)
    config = copy.deepcopy(core.config)
    for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
        vars(config).pop(name, None)
    with torch.device("meta"):
        wanted = set(kind(copy.deepcopy(config)).state_dict())
    state: dict[str, Any] = {k: _Held(v, dtype) for k, v in _tensors(core) if k in wanted}
    state |= {f"{name}.weight": _Held(layer, dtype) for name, layer in layers.items()}
    state |= stored
    plain, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise AdapterError(
            "FG-ADAPT-075",
            f"{kind.__name__} has weights that the trained model lacks: "
            f"{', '.join(sorted(report['missing_keys'])[:3])}",
            allowed="a model with every weight of its class",
            fix="load the base and its adapter anew, then merge",
        )
    plain.generation_config = copy.deepcopy(getattr(core, "generation_config", None))
    plain.config.name_or_path = plain.name_or_path = core.config.name_or_path
    return plain


def _tensors(core: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in core.named_parameters(remove_duplicate=False):
        yield _plain_name(name), value
    for name, value in core.named_buffers(remove_duplicate=False):
        yield _plain_name(name), value


def _merge_into(plain: Any, model: Any) -> Any:
    """Attach a copy of the active adapter of ``model`` to ``plain`` and let peft merge it."""
    active = model.active_adapters[0]
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name, selected_adapters=[active], save_embedding_layers=False)
        folder = Path(name) if active == "default" else Path(name) / active
        _plugin.register_for(folder)
        config = _tokens.saved_config(folder)
        wrapped = PeftModel.from_pretrained(plain, str(folder), config=config)
    return wrapped.merge_and_unload().eval()
