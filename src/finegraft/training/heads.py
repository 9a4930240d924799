"""Heads that an adapter trains whole, kept in float32 above a bfloat16 model.

What: ``keep_precise`` gives the linear layers that peft trains beside an adapter
(``modules_to_save``) float32 weights, and a hook that brings their input to that precision.
Constraint: a bfloat16 weight near 0.02 moves in steps of 6e-5, so the small updates of a decaying
learning rate would be lost. Trade-off: none in speed for a classifier, whose head is one or two
layers on one token a row; a causal model's loss rounds the copy of its head once a step, and until
it is opened again it generates through transformers' loop. The saved head is float32 too, and
loads into a model of any precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LOW = (torch.bfloat16, torch.float16)


def keep_precise(model: nn.Module) -> int:
    """Give trained heads of ``model`` float32 weights; return how many layers were changed.

    Args:
        model: Any model; only linear layers under a ``modules_to_save`` whose weights train and
            are in half precision are touched.
    """
    found = [
        module
        for name, module in model.named_modules()
        if "modules_to_save" in name.split(".")
        and isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and module.weight.dtype in _LOW
    ]
    for module in found:
        module.float()
        module.register_forward_pre_hook(_own_precision)
    return len(found)


def _own_precision(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = args
    return (x.to(module.weight.dtype), *others)
