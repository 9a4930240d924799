"""Layers of one input computed as one product: q, k and v, or gate and up.

What: ``stack`` puts frozen weights behind one another in memory, each still a parameter of its own
module; ``project`` runs the layers as one function when they allow it, else one by one.
Constraint: no second copy of a weight is kept, and nothing is remembered: whether weights lie
behind one another is looked at in each call, so ``.to()``, loading or merging cannot leave stale
data behind; they only cost the single product until ``stack`` is called again. Trade-off: layers
with hooks, or of a class that does not tell its part, run one by one.

Shapes: t tokens, i in, o_j out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finegraft.kernels import lora_group as kernel


def linear(module: nn.Module) -> nn.Module:
    """The layer that holds the weight: the module, or what an adapter wraps."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


@torch.no_grad()
def stack(modules: Sequence[nn.Module]) -> bool:
    """Put the weights of plain linear layers behind one another; False when they differ in kind."""
    layers = [linear(module) for module in modules]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    weights = [layer.weight for layer in layers]
    kinds = {(w.shape[1], w.dtype, w.device) for w in weights}
    if len(kinds) > 1 or weights[0].is_meta:
        return False
    for weight, view in zip(weights, kernel.stack([w.data for w in weights]), strict=True):
        weight.data = view
    return True


def project(modules: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return every module's output for ``x`` [..., i]."""
    parts = [_part(module, x) for module in modules]
    if None in parts:
        return tuple(module(x) for module in modules)
    return kernel.lora_group(x, parts)


def _part(module: Any, x: torch.Tensor) -> kernel.Part | None:
    """What a module adds to a group, or None when it must be called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if hasattr(module, "lora_part"):
        found: kernel.Part | None = module.lora_part(x)
        return found
    if torch.is_autocast_enabled(x.device.type):
        return None
    if type(module) is not nn.Linear or "forward" in vars(module):
        return None
    if module.weight.requires_grad or module.weight.dtype != x.dtype:
        return None
    return kernel.Part(module.weight, module.bias, None, None, 1.0)
