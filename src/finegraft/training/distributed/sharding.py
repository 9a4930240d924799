"""Frozen layers of which each process keeps a part (FSDP2).

What: ``shard`` splits the frozen weights of every decoder layer over all processes; what trains,
the embedding and the head stay whole in each. How: torch's ``fully_shard`` on each layer: the parts
are put together before a layer runs and let go of afterwards; the gradients of what trains are
averaged in one message a step. Constraint: checkpoints and adapters are those of unsharded
training, so a run goes on with or without sharding and on any number of processes. Trade-off: each
process reads the whole base before it keeps its part; groups of layers run as single products,
because their weights no longer lie behind one another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig
from finegraft.models import swap

logger = logging.getLogger(__name__)

# State by the name of the weight, so that how weights are grouped may differ.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def require_possible(config: TrainConfig) -> None:
    """Prove that a base can be sharded as configured.

    Raises:
        ConfigError: FG-DIST-011, one process; FG-DIST-012, a base or method that cannot.
    """
    if config.sharding == "none":
        return
    if config.nproc * config.nnodes == 1:
        raise ConfigError(
            "FG-DIST-011",
            "sharding: fsdp2 in one process, which would keep everything",
            allowed="two processes or more",
            fix="--nproc 2, or --sharding none",
        )
    reason = None
    if config.load_in_4bit or config.load_in_8bit:
        reason = (
            "the base is quantized: its packed weights lose their scales when they are split",
            "--no-load-in-4bit, or --sharding none",
        )
    elif config.task != "causal" and config.trains_all:
        reason = ("every weight of a classifier is to train", "--method lora, or --sharding none")
    if reason:
        raise ConfigError(
            "FG-DIST-012",
            f"sharding: fsdp2, and {reason[0]}",
            allowed="a 16-bit or 32-bit base; under a classifier with an adapter only",
            fix=reason[1],
        )


def shard(model: nn.Module, device: torch.device) -> bool:
    """Split the decoder layers of ``model``: frozen weights, or all where every weight trains.

    Args:
        model: As it is called in training; its layers are called through it alone from now on.
        device: Where the parts live.

    Returns:
        Whether weights that train are split.

    Raises:
        ConfigError: FG-DIST-012, a model without a list of layers.
    """
    from torch.distributed.fsdp import fully_shard

    layers = getattr(swap.decoder(model), "layers", None)
    if layers is None:
        raise ConfigError(
            "FG-DIST-012",
            f"sharding: fsdp2, and a {type(swap.core(model)).__name__} has no list of layers",
            allowed="decoders whose layers are known",
            fix="--sharding none",
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, src=0)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    every = all(p.requires_grad for layer in layers for p in layer.parameters())
    for layer in layers:
        whole = set() if every else {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    rest = {p for p in model.parameters() if not isinstance(p, DTensor)}
    fully_shard(model, mesh=mesh, ignored_params=rest)
    here = kept_bytes(model)
    logger.info("fsdp2: %.1f MB of the layers' weights are kept in this process", here / 1e6)
    return every


def kept_bytes(model: nn.Module) -> int:
    """Bytes of split weights that this process keeps."""
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    return sum(p.to_local().numel() * p.element_size() for p in split)


def average_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Average the gradients of what every process keeps whole; return the bytes sent."""
    whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    grads = [p.grad for p in whole if p.grad is not None]
    sent = 0
    for dtype in {grad.dtype for grad in grads}:
        group = [grad for grad in grads if grad.dtype == dtype]
        flat = torch._utils._flatten_dense_tensors(group)
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = torch._utils._unflatten_dense_tensors(flat, group)
        for grad, part in zip(group, parts, strict=True):
            grad.copy_(part)
        sent += flat.numel() * flat.element_size()
    return sent


def separate(optimizer: torch.optim.Optimizer) -> None:
    """Give split parameters groups of their own: one kernel takes either kind, never both."""
    for group in list(optimizer.param_groups):
        split = [p for p in group["params"] if isinstance(p, DTensor)]
        if not split or len(split) == len(group["params"]):
            continue
        group["params"] = [p for p in group["params"] if not isinstance(p, DTensor)]
        settings = {k: v for k, v in group.items() if k != "params"}
        optimizer.add_param_group({**settings, "params": split})


def whole_state(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The weights of ``model``, put together one by one; every process calls this.

    Args:
        keep: Whether this process wants them; the others help and get nothing.
    """
    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if keep:
            found[name] = value.detach().cpu()
    return found


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write the optimizer's state, each process its part (torch.distributed.checkpoint)."""
    state = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    dcp.save({"optimizer": state}, checkpoint_id=str(folder))


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Read what any number of processes wrote; each process takes its part, one takes all."""
    state = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    dcp.load({"optimizer": state}, checkpoint_id=str(folder))
    set_optimizer_state_dict(model, optimizer, state, options=_BY_NAME)


def for_groups(schedule: dict[str, Any], count: int) -> dict[str, Any]:
    """The state of a schedule for ``count`` groups, all of one learning rate."""
    lists = {k: [v[0]] * count for k, v in schedule.items() if isinstance(v, list) and v}
    return {**schedule, **lists}
