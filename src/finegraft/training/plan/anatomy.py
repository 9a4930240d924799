"""What a model is made of and what it keeps for backward, found without its weights.

What: ``anatomy`` counts parameters by kind and measures what one layer keeps. How: the whole model
is built on torch's meta device, which allocates nothing, and gets its adapter there; then one layer
and two layers of the same widths are built for real, with random weights and a small vocabulary,
and run on a few real rows under autograd's hooks, once. Constraint: widths, method, swaps and
precision are those of the run, because the same functions make them. Trade-off: half a second for
a model of 135M parameters and the memory of two layers; a model that these cannot be built for gets
a usual figure, and ``measured`` says so.

Shapes: t tokens, d hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from finegraft import adapters, opening
from finegraft.adapters._lora_start import doubles
from finegraft.core.errors import AdapterError
from finegraft.core.schema import TrainConfig
from finegraft.models import causal_loss, families, load, swap
from finegraft.models.locate import locate
from finegraft.training import heads, memory
from finegraft.training.collate import Collator
from finegraft.training.tasks._contract import settings

logger = logging.getLogger(__name__)

_CLASSES = {
    "causal": ("AutoModelForCausalLM", adapters.CAUSAL),
    "classification": ("AutoModelForSequenceClassification", adapters.SEQUENCE),
    "token_classification": ("AutoModelForTokenClassification", adapters.TOKEN),
}
_SMALL_VOCABULARY = 512
_SAMPLE_TOKENS = 512
# Kept for backward by a layer with LoRA on all linears, in values per token and unit of width; for
# models whose layers cannot be built here.
USUAL_KEPT = 17.0
LIBRARY_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Anatomy:
    """Counts of parameters, and bytes.

    Attributes:
        layers: Layers of the stack.
        hidden: d.
        vocabulary: Rows of the head that scores tokens; 0 for a classifier.
        itemsize: Bytes of a value of the frozen weights.
        linear: Parameters of the linear maps inside the layers.
        quantized: The part of ``linear`` that is held in 4 or 8 bits.
        parameters: All parameters without those of the adapter.
        weight_bytes: What the base takes.
        stacked_bytes: Second copies of weights whose file stays mapped, see ``models.together``.
        trained: Parameters that train.
        trained_bytes: What they take.
        trains_all: Every weight trains.
        reaches_down: A gradient goes down through the layers; False when only the head trains.
        kept_layer: Bytes that one layer keeps for backward per token.
        kept_once: Bytes per token kept outside the layers.
        flat: The model takes documents behind one another, without padding.
        tokenizer_bytes: Files of the tokenizer, which stand in every checkpoint.
        measured: ``kept_layer`` comes from real layers.
    """

    layers: int
    hidden: int
    vocabulary: int
    itemsize: int
    linear: int
    quantized: int
    parameters: int
    weight_bytes: int
    stacked_bytes: int
    trained: int
    trained_bytes: int
    trains_all: bool
    reaches_down: bool
    kept_layer: float
    kept_once: float
    flat: bool
    tokenizer_bytes: int
    measured: bool


@dataclass(frozen=True)
class _Kept:
    layer: float
    once: float
    flat: bool
    stacked: float  # parameters of a layer
    measured: bool


def anatomy(config: TrainConfig, data: Any, sample: list[dict[str, Any]]) -> Anatomy:
    """Take the model of ``config`` apart.

    Args:
        data: Of ``tasks.check``.
        sample: Some rows with ``input_ids`` and, for causal models, ``labels``.
    """
    located = locate(config.model, revision=config.revision)
    base = opening.base_of(located) if located.kind == "adapter" else located
    model_config = load.load_config(base.path, trust_remote_code=config.trust_remote_code)
    _label(model_config, config, data)
    dtype = load.resolve_dtype(config.dtype, load.facts().device)
    with torch.random.fork_rng(devices=[]), _Quietly():
        with torch.device("meta"):
            model = _attached(config, _made(config, model_config, dtype))
        kept = _kept(config, model_config, dtype, sample)
    text = model_config.get_text_config()
    core = swap.core(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    every = frozen if not config.trains_all else trained
    quantized = _quantizable(core) if config.load_in_4bit or config.load_in_8bit else 0
    mapped = not quantized and _stored_dtype(base.path) == dtype and not config.trains_all
    itemsize = dtype.itemsize
    return Anatomy(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size if config.task == "causal" else 0,
        itemsize=itemsize,
        linear=_linear(core),
        quantized=quantized,
        parameters=sum(p.numel() for p in every),
        weight_bytes=sum(p.numel() * p.itemsize for p in every)
        - quantized * itemsize
        + int(quantized * quantized_bytes(config)),
        stacked_bytes=int(kept.stacked * itemsize * text.num_hidden_layers) if mapped else 0,
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.itemsize for p in trained),
        trains_all=config.trains_all,
        reaches_down=config.method != "head",
        kept_layer=kept.layer,
        kept_once=kept.once,
        flat=kept.flat,
        tokenizer_bytes=sum(f.stat().st_size for f in base.path.glob("tokenizer*.json")),
        measured=kept.measured,
    )


def _label(model_config: Any, config: TrainConfig, data: Any) -> None:
    """Give the head of a classifier its size."""
    if config.task == "causal":
        return
    labels = getattr(data, "labels", None)
    model_config.num_labels = labels.count if labels is not None else len(data.names)
    if labels is not None:
        model_config.problem_type = labels.problem_type


class _Quietly:
    """Keep finegraft's own lines about swaps back while models are built that nobody trains."""

    def __enter__(self) -> None:
        self._log = logging.getLogger("finegraft")
        self._level = self._log.level
        self._log.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._log.setLevel(self._level)


def _made(config: TrainConfig, model_config: Any, dtype: torch.dtype) -> Any:
    kind = getattr(transformers, _CLASSES[config.task][0])
    return kind.from_config(
        copy.deepcopy(model_config), dtype=dtype, trust_remote_code=config.trust_remote_code
    )


def _attached(config: TrainConfig, model: Any) -> Any:
    task_type = _CLASSES[config.task][1]
    if config.trains_all:
        return adapters.attach(model, "full", task_type=task_type, **config.method_settings)
    given = settings(config)
    start = given.get("init_lora_weights")
    if start:  # computed from the weights, which meta tensors do not have
        given["init_lora_weights"] = None
        given["r"] *= 2 if doubles(start) else 1
    return adapters.attach(model, config.method, task_type=task_type, **given)


def _linear(model: nn.Module) -> int:
    """Parameters of the linear maps inside the layers, embeddings and heads aside."""
    stack = swap.decoder(model)
    outside = {id(m) for m in (model.get_output_embeddings(), model.get_input_embeddings())}
    return sum(
        module.weight.numel()
        for name, module in stack.named_modules()
        if "lora_" not in name
        and id(module) not in outside
        and isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
    )


def _quantizable(model: nn.Module) -> int:
    """Parameters that loading in 4 or 8 bits takes hold of: linear, and not in a head."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "lora_" not in name
        and not any(part in name for part in ("lm_head", "classifier", "score", "pooler"))
    )


def quantized_bytes(config: TrainConfig) -> float:
    """Bytes of a quantised value, its scales included."""
    if config.load_in_8bit:
        return 1.0
    return 0.5 + (0.127 / 8 if config.bnb_4bit_use_double_quant else 4 / 64)


def _stored_dtype(path: Path) -> torch.dtype | None:
    """Precision of the weight files, None where it is mixed or not to be seen."""
    found = set()
    for file in sorted(path.glob("*.safetensors"))[:1]:
        try:
            with safe_open(str(file), "pt") as weights:
                found = {weights.get_slice(k).get_dtype() for k in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return names.get(found.pop()) if len(found) == 1 else None


def _kept(
    config: TrainConfig, model_config: Any, dtype: torch.dtype, sample: list[dict[str, Any]]
) -> _Kept:
    """Run one and two real layers on ``sample``."""
    try:
        made = [_small(config, model_config, dtype, depth) for depth in (1, 2)]
        flat = families.is_padding_free(made[0]) if config.task == "causal" else _drops(made[0])
        method = None if config.trains_all else adapters.find(config.method)[0]
        flat = flat and getattr(method, "not_packed", None) is None
        ids = swap.core(made[0]).config.get_text_config().vocab_size
        batch = _batch(config, sample, flat, ids)
        one, two = (memory.kept_bytes(model, batch) for model in made)
    except (*LIBRARY_ERRORS, AdapterError) as error:
        logger.info("no layer of this model can be tried alone (%s): taking usual figures", error)
        text = model_config.get_text_config()
        usual = USUAL_KEPT * text.hidden_size * dtype.itemsize
        return _Kept(usual, 0.0, False, 0.0, False)
    tokens = _tokens(batch, flat)
    layer = max(0, two - one) / tokens
    stacked = sum(
        getattr(module, name).weight.numel()
        for module in made[0].modules()
        if swap.is_swapped(module)
        for name in getattr(module, "together", ())
        if hasattr(getattr(module, name), "weight")
    )
    return _Kept(layer, max(0.0, one / tokens - layer), flat, stacked, True)


def _drops(model: nn.Module) -> bool:
    """Whether this encoder drops the padding of a batch itself."""
    return any(hasattr(type(m), "_flattened") for m in swap.core(model).modules())


def _small(config: TrainConfig, model_config: Any, dtype: torch.dtype, depth: int) -> Any:
    """``depth`` layers of the run's model, ready to train."""
    small = copy.deepcopy(model_config)
    text = small.get_text_config()
    text.num_hidden_layers = depth
    text.vocab_size = min(text.vocab_size, _SMALL_VOCABULARY)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, list(getattr(text, name))[:depth])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), text.vocab_size - 1))
    few = config.model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    model = _attached(few, _made(few, small, dtype))
    if config.task == "causal":
        causal_loss.apply(model)
    families.apply(model)
    adapters.accelerate(model)
    heads.keep_precise(model)
    return model.train()


def _batch(
    config: TrainConfig, sample: list[dict[str, Any]], flat: bool, vocabulary: int
) -> Mapping[str, Any]:
    """A few rows as the model takes them, their ids below ``vocabulary``."""
    rows: list[dict[str, Any]] = []
    left = _SAMPLE_TOKENS
    for row in sample:
        ids = [i % vocabulary for i in row["input_ids"]][:_SAMPLE_TOKENS]
        if rows and len(ids) > left:
            break
        left -= len(ids)
        labels = row["labels"][: len(ids)] if config.task == "causal" else None
        made = {"input_ids": ids, "labels": labels}
        if "seq_lengths" in row and len(ids) == len(row["input_ids"]):
            made["seq_lengths"] = row["seq_lengths"]
        rows.append(made)
    if config.task == "causal":
        inner = [i if i < 0 else i % vocabulary for row in rows for i in row["labels"]]
        for row in rows:
            row["labels"], inner = inner[: len(row["labels"])], inner[len(row["labels"]) :]
        return {**Collator(0, flat=flat)(rows), "use_cache": False}
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[i, :size], mask[i, :size] = torch.tensor(row["input_ids"]), 1
    shape = (len(rows),) if config.task == "classification" else (len(rows), width)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(shape).long()}


def _tokens(batch: Mapping[str, Any], flat: bool) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if flat and mask is not None else int(batch["input_ids"].numel())
