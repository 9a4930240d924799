"""A trained model as plain weights, one tensor at a time, whatever it is made of.

What: ``open_plain`` gives configuration, tokenizer and a mapping from names to tensors that are
computed when they are read. How: a LoRA folder beside plain safetensors never becomes a model, each
tensor is W + s * B @ A; a model in memory gives each layer merged alone; every other adapter that
can be merged goes through ``adapters.merge_to_16bit``. Constraint: the trained model is left as it
is; a head that training made different from a tied embedding is written as a matrix of its own.
Trade-off: a merge is rounded once, from float32; to bfloat16 up or down at random (``rounded``),
which is less exact for a weight and more for an answer.

Shapes: o rows and i columns of a weight, r rank; A [r, i], B [o, r].
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finegraft import adapters, opening
from finegraft.core.errors import ExportError, ModelError
from finegraft.export._origin import Origin
from finegraft.export._rounding import rounded, seed_of
from finegraft.models import _stream, classifier, load, quantize, swap, weights
from finegraft.models import tokenizer as tokenizers

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES = {**HALVES, "float32": torch.float32}
# Steps of a module path that peft's wrappers add.
_WRAPPERS = {"base_layer", "original_module", "token_adapter"}
# Settings of a saved LoRA that make it more than W + s * B @ A.
_MORE = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_EMPTY = (None, False, [], {}, "none")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is computed when it is read; stands in for safetensors' own slices.

    Attributes:
        shape: Of the tensor.
        read: Returns it, in any floating dtype.
        dtype: What a reader gets; None: as ``read`` gives it.
        seed: Of the rounding of a trained weight, see ``rounded``; None: to the nearest.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    dtype: torch.dtype | None = None
    seed: int | None = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Compute the tensor, then return ``index`` of it."""
        value = self.read().detach()
        if self.dtype is not None and value.is_floating_point():
            fine = value.dtype == torch.float32 and self.seed is not None
            coarse = self.dtype == torch.bfloat16
            value = rounded(value, self.seed) if fine and coarse else value.to(self.dtype)
        return value[index]

    def get_shape(self) -> list[int]:
        """The shape, as safetensors gives it."""
        return list(self.shape)


@dataclass(frozen=True)
class Plain:
    """A model of which nothing is quantized and no adapter is left.

    Attributes:
        config: Its configuration, with the dtype that is written.
        tensors: By name; ``tensors[name][...]`` gives the values.
        tokenizer: As it was trained.
        generation: Settings of ``generate``, or None.
        name: What the model is called.
        dtype: Of every floating tensor.
        kind: The class, by its name in transformers.
        merged: How the weights came about, for people.
    """

    config: Any
    tensors: Mapping[str, Lazy]
    tokenizer: Any
    generation: Any
    name: str
    dtype: torch.dtype
    kind: str
    merged: str

    @property
    def bytes(self) -> int:
        """What all tensors take in their dtype."""
        return sum(math.prod(t.shape) for t in self.tensors.values()) * self.dtype.itemsize


def find_dtype(name: str | torch.dtype | None, stored: Any = None) -> torch.dtype:
    """The dtype to write: as asked for, else what the base was published in, else bfloat16.

    Raises:
        ExportError: FG-EXPORT-030, none of the three that can be written.
    """
    if name is None:
        text = str(stored).removeprefix("torch.")
        return HALVES.get(text, torch.bfloat16)
    text = str(name).removeprefix("torch.")
    if text not in _DTYPES:
        raise ExportError(
            "FG-EXPORT-030",
            f"dtype is {text!r}",
            allowed=", ".join(_DTYPES),
            fix="leave it out, for the dtype that the base was published in",
        )
    return _DTYPES[text]


def open_plain(origin: Origin, dtype: str | torch.dtype | None = None) -> Plain:
    """Return the weights of ``origin``, merged.

    Args:
        dtype: ``bfloat16``, ``float16`` or ``float32``; None: what the base was published in.

    Raises:
        AdapterError: FG-ADAPT-003 another base, FG-ADAPT-073 several active adapters.
        ExportError: FG-EXPORT-030, an unknown dtype.
    """
    if origin.in_memory is None:
        streamed = _from_disk(origin, dtype)
        if streamed is not None:
            return streamed
    return _from_model(origin, dtype)


# --- from folders -------------------------------------------------------------------------------


def _from_disk(origin: Origin, dtype: Any) -> Plain | None:
    """The weights without a model in memory; None where that takes more than sums of matrices."""
    located = origin.located
    base = opening.base_of(located) if located.kind == "adapter" else located
    if origin.task == classifier.SEQUENCE:
        return None  # a head that the checkpoint lacks comes with the model's class
    config = load.load_config(base.path)
    if getattr(config, "quantization_config", None) is not None:
        return None
    stored = _stream.open_files(weights.check(base.path))
    if stored is None:
        return None
    updates = _updates(located.path, stored) if located.kind == "adapter" else {}
    if updates is None:
        return None
    if located.kind == "adapter":
        table = next((v for n, v in stored.items() if n.endswith("embed_tokens.weight")), None)
        if table is None:
            return None
        opening.check_embedding(table[...], located.path)
    half = find_dtype(dtype, getattr(config, "dtype", None))
    tensors = {
        name: Lazy(
            entry.shape,
            _sum(entry, updates.get(name)),
            half,
            seed_of(name) if name in updates else None,
        )
        for name, entry in stored.items()
    }
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    generation = _generation(base.path)
    tokenizer = origin.tokenizer
    _agree(config, generation, tokenizer)
    config.dtype = half
    merged = "copied" if not updates else f"{len(updates)} LoRA updates added to {base.name}"
    kind = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    return Plain(config, tensors, tokenizer, generation, origin.name, half, kind, merged)


def _generation(folder: Path) -> Any:
    from transformers import GenerationConfig

    found = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder) if found else None


def _agree(config: Any, generation: Any, tokenizer: Any) -> None:
    holder = type("Holder", (), {"config": config, "generation_config": generation})()
    tokenizers.agree(holder, tokenizer)


@dataclass(frozen=True)
class _Update:
    a: Any  # [r, i]
    b: Any  # [o, r]
    scale: float


def _updates(folder: Path, stored: Mapping[str, Any]) -> dict[str, _Update] | None:
    """The LoRA of a folder by the names of the base's tensors; None for anything beyond that."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        return None
    if any(settings.get(name) not in _EMPTY for name in _MORE):
        return None
    saved = _stream.open_files([folder / opening.WEIGHTS]) if _whole(folder) else None
    if saved is None:
        return None
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    found: dict[str, _Update] = {}
    for key, a in saved.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part == "B.weight":
            continue
        b = saved.get(key.replace(".lora_A.", ".lora_B."))
        place = next(
            (n for n in (f"{name}.weight", f"{name}.weight".partition(".")[2]) if n in stored), None
        )
        if part != "A.weight" or b is None or place is None:
            return None
        if stored[place].shape != (b.shape[0], a.shape[1]) or a.shape[0] != rank:
            return None
        found[place] = _Update(a, b, scale)
    return found or None


def _whole(folder: Path) -> bool:
    file = folder / opening.WEIGHTS
    if not file.is_file():
        return False
    try:
        weights.check_safetensors(file)
    except ModelError:
        return False  # opening it tells what is wrong
    return True


def _sum(entry: Any, update: _Update | None) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        value: torch.Tensor = entry[...]
        if update is None:
            return value
        product = update.b[...].float() @ update.a[...].float()
        return value.float() + update.scale * product

    return read


# --- from a model in memory ---------------------------------------------------------------------


def _from_model(origin: Origin, dtype: Any) -> Plain:
    model, tokenizer = origin.model(), origin.tokenizer
    core = swap.core(model)
    half = find_dtype(dtype, _published(core))
    merged = "copied"
    if hasattr(model, "peft_config"):
        adapters.check_mergeable(model)
        merged = "the adapter added to the weights as they were loaded"
        if not _simple(model):
            result = adapters.merge_to_16bit(model, dtype=half)
            core, merged = result.model, f"the adapter merged into {result.base} weights"
    config = copy.deepcopy(core.config)
    for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
        vars(config).pop(name, None)
    stock: Any = swap.stock_class(core)
    originals, how = _originals(core)
    tensors = _tensors(core, config, half, originals)
    merged += how
    _untie(config, tensors)
    config.dtype = half
    config.architectures = [stock.__name__]
    generation = copy.deepcopy(getattr(core, "generation_config", None))
    kind = stock.__name__
    return Plain(config, tensors, tokenizer, generation, origin.name, half, kind, merged)


def _published(core: Any) -> Any:
    """The dtype in the folder that the model was loaded from, whatever it was loaded in."""
    folder = Path(getattr(core.config, "name_or_path", "") or "")
    if (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = values.get("dtype") or values.get("torch_dtype")
        if found:
            return found
    return getattr(core, "dtype", None)


def _simple(model: Any) -> bool:
    """Whether each layer of the active adapter can be merged alone, by adding to a weight."""
    active = model.active_adapters[0]
    for module in swap.core(model).modules():
        if not hasattr(module, "get_base_layer") or not hasattr(module, "merged_adapters"):
            continue
        if hasattr(module, "trainable_tokens_delta"):
            if module.merged or type(module.get_base_layer()) not in (nn.Embedding, nn.Linear):
                return False
            continue
        if not hasattr(module, "get_delta_weight") or active not in getattr(module, "lora_A", {}):
            return False
        special = getattr(module, "lora_variant", {})
        if module.merged or active in special or module.lora_bias.get(active, False):
            return False
        if not isinstance(module.get_base_layer(), nn.Linear):
            return False
    return True


def _originals(core: Any) -> tuple[dict[str, Any], str]:
    """Weights that were quantized, as their folder still holds them, and words for people."""
    if not getattr(core, "is_quantized", False):
        return {}, ""
    layers = {_plain_name(n): m for n, m in quantize.quantized_layers(core).items()}
    stored, reason = adapters.original_weights(Path(core.config.name_or_path), layers)
    return stored, f", dequantized ({reason})" if reason else ", in their original precision"


def _plain_name(path: str) -> str:
    return ".".join(part for part in path.split(".") if part and part not in _WRAPPERS)


def _tensors(
    core: Any, config: Any, dtype: torch.dtype, originals: Mapping[str, Any]
) -> dict[str, Lazy]:
    """Every weight of the stock class, read out of ``core`` with its active adapter merged."""
    stock: Any = swap.stock_class(core)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in stock(copy.deepcopy(config)).state_dict().items()}
    found = {}
    for path, module in core.named_modules(remove_duplicate=False):
        place = _plain_name(path)
        trained = hasattr(module, "lora_A") or hasattr(module, "modules_to_save")
        for name, value in _own(module, originals.get(f"{place}.weight")):
            plain = f"{place}.{name}" if place else name
            if plain in shapes and plain not in found:
                seed = seed_of(plain) if trained else None
                found[plain] = Lazy(shapes[plain], value, dtype, seed)
    return {name: found[name] for name in shapes if name in found}


def _own(module: Any, original: Any) -> list[tuple[str, Callable[[], torch.Tensor]]]:
    """Names and readers of the weights that a module stands for, its adapter included.

    Args:
        original: What a quantized weight was, where that is known.
    """
    active = getattr(module, "active_adapters", None) or []
    if callable(active):
        active = []
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        name = next((a for a in active if a in module.modules_to_save), None)
        inner = module.original_module if name is None else module.modules_to_save[name]
        whole = [*inner.named_parameters(), *inner.named_buffers()]
        return [(n, lambda v=v: v) for n, v in whole]
    if hasattr(module, "trainable_tokens_delta"):
        base = module.get_base_layer()
        rest = [(n, lambda v=v: v) for n, v in _direct(base) if n != "weight"]
        return [("weight", lambda: module.get_merged_weights(active)), *rest]
    if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
        base = module.get_base_layer()
        rest = [(n, lambda v=v: v) for n, v in _direct(base) if n != "weight"]
        return [("weight", lambda: _merged(module, active, original)), *rest]
    if hasattr(module, "get_base_layer") or hasattr(module, "token_adapter"):
        return []
    if _quantized(module):
        rest = [(n, lambda v=v: v) for n, v in _direct(module) if n == "bias"]
        return [("weight", lambda: _dense(module, original)), *rest]
    return [(n, lambda v=v: v) for n, v in _direct(module)]


def _direct(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, value) for name, value in found if value is not None]


def _quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and not weight.is_floating_point()  # type: ignore[union-attr]


def _dense(layer: Any, original: Any) -> torch.Tensor:
    """The weight of a layer in float32, whether it is quantized or not."""
    if not _quantized(layer):
        return layer.weight.detach().float()
    if original is None:
        return quantize.dense_weight(layer, torch.float32)
    return original[...].float()


def _merged(module: Any, active: list[str], original: Any) -> torch.Tensor:
    """W + s * B @ A of one layer, in float32."""
    total = _dense(module.get_base_layer(), original)
    for name in active:
        if name in module.lora_A:
            total = total + module.get_delta_weight(name).detach().float().to(total.device)
    return total


def _untie(config: Any, tensors: dict[str, Lazy]) -> None:
    """Leave out a head that is the embedding; keep one that training made another."""
    head = tensors.get("lm_head.weight")
    table = next((t for n, t in tensors.items() if n.endswith("embed_tokens.weight")), None)
    if head is None or table is None or not getattr(config, "tie_word_embeddings", False):
        return
    if head.shape == table.shape and torch.equal(head[...], table[...]):
        tensors.pop("lm_head.weight")
    else:
        config.tie_word_embeddings = False
