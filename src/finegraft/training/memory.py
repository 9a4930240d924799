"""Recompute only as many layers as memory asks for.

What: before the first step, the bytes that one layer keeps for backward are measured on a few real
tokens; with the largest micro-batch of the data and the memory that is free, that says how many
layers must be recomputed, most often none. How: autograd's own hooks see every tensor that is
kept; two depths are compared, so that embedding and head do not count as layers. Constraint: only
models whose layers can be checkpointed one by one, and only where nobody has asked for it already.
Trade-off: what a layer keeps is taken as linear in the tokens, which it is but for the scores of
short documents; the sample is a document of the usual length for that reason.

Shapes: t tokens of a micro-batch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finegraft.core.memory import available_bytes
from finegraft.models import swap
from finegraft.training.distributed import world

logger = logging.getLogger(__name__)

# Share of the free memory that kept activations may take; the rest is for gradients, the
# optimizer's state, logits of a chunk, and other programs.
SHARE = 0.7


@dataclass(frozen=True)
class Plan:
    """What a step keeps for backward, and what is done about it.

    Attributes:
        layers: Layers of the model.
        recomputed: How many of them, from the first on, are recomputed in backward.
        bytes_per_layer: What one layer keeps for the largest micro-batch.
        free_bytes: Memory that was free.
    """

    layers: int
    recomputed: int
    bytes_per_layer: int
    free_bytes: int


def free_bytes(device: torch.device) -> int:
    """Memory that a step could take on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() // world.here().local_size


def kept_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes that autograd keeps for the backward of one forward; parameters do not count."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def plan(model: nn.Module, batch: Mapping[str, Any], largest: int) -> Plan | None:
    """Measure and decide; None when this model's layers cannot be counted.

    Args:
        model: In training mode, with what will be trained.
        batch: A small batch with ``input_ids`` and ``labels``.
        largest: t, the tokens of the largest micro-batch.
    """
    core, decoder = swap.core(model), swap.decoder(model)
    config, layers = getattr(decoder, "config", None), getattr(decoder, "layers", None)
    if layers is None or config is None or len(layers) < 3:
        return None
    depth, sizes = config.num_hidden_layers, []
    try:
        for config.num_hidden_layers in (1, 2):
            sizes.append(kept_bytes(model, batch))
    finally:
        config.num_hidden_layers = depth
    tokens = batch["input_ids"].numel()
    a_layer = max(0, sizes[1] - sizes[0]) * largest // tokens
    free = free_bytes(next(core.parameters()).device)
    missing = a_layer * depth - int(free * SHARE)
    # A recomputed layer keeps its two inputs, and while it is recomputed everything again.
    saved = a_layer - 2 * largest * config.hidden_size * core.dtype.itemsize
    recomputed = 0 if missing <= 0 else min(depth, -(-(missing + a_layer) // max(saved, 1)))
    return Plan(depth, recomputed, a_layer, free)


def agreed(chosen: Plan) -> Plan:
    """The same choice in every process: that of the one with the least memory."""
    return max(world.gathered(chosen), key=lambda plan: plan.recomputed)


def apply(model: nn.Module, chosen: Plan) -> None:
    """Recompute the first ``chosen.recomputed`` layers in backward, and no other."""
    for layer in swap.decoder(model).layers[: chosen.recomputed]:
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True
    if chosen.recomputed:
        logger.warning(
            "%d of %d layers are recomputed in backward: they would keep %.1f GB, %.1f GB are free",
            chosen.recomputed,
            chosen.layers,
            chosen.layers * chosen.bytes_per_layer / 2**30,
            chosen.free_bytes / 2**30,
        )
