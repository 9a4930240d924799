"""LoRA+: the matrices B learn faster than the matrices A (arXiv:2402.12354).

What: ``raise_lora_b`` splits the groups of an optimizer, so that every B has its own learning rate,
a multiple of the rest's. How: the trainer's own optimizer, of whatever kind, with more groups.
Constraint: the first group keeps the plain learning rate, which is the one that is logged; the
order of the groups depends on the model alone, so a resumed run finds its state. Trade-off:
embeddings with a LoRA keep the plain rate (peft's helper gives them a millionth of a fixed size).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finegraft.core.errors import AdapterError, ConfigError


def check_ratio(ratio: float | None) -> float | None:
    """Return ``ratio``, which must be above 0; None and 1 leave all learning rates alike.

    Raises:
        ConfigError: FG-ADAPT-061.
    """
    if ratio is not None and (isinstance(ratio, bool) or not ratio > 0):
        raise ConfigError(
            "FG-ADAPT-061",
            f"loraplus_lr_ratio={ratio!r}",
            allowed="a number above 0; 16 is the paper's, 4 to 16 are usual",
            fix="loraplus_lr_ratio=16, or leave it out",
        )
    return ratio


def raise_lora_b(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> int:
    """Multiply the learning rate of every LoRA B by ``ratio``; return how many there are.

    Args:
        optimizer: Fresh, without state.
        model: The model whose parameters it holds.
        ratio: Of B's learning rate to A's.

    Raises:
        AdapterError: FG-ADAPT-060, the optimizer holds no LoRA B.
    """
    wanted = {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in wanted]
    if not held:
        raise AdapterError(
            "FG-ADAPT-060",
            f"loraplus_lr_ratio={ratio} for a {type(model).__name__} that trains no LoRA",
            allowed="a model with a LoRA adapter: LoRA+ is about its matrices A and B",
            fix="leave loraplus_lr_ratio out, or method='lora'",
        )
    for group in list(optimizer.param_groups):
        faster = [p for p in group["params"] if id(p) in wanted]
        if not faster:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        settings = {k: v for k, v in group.items() if k != "params"}
        lr: Any = group["lr"] * ratio
        optimizer.add_param_group({**settings, "params": faster, "lr": lr})
    return len(held)


class LoraPlus:
    """Mixed into the trainers: follows ``loraplus_lr_ratio`` of their arguments."""

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The stock optimizer, with B's groups apart; one that was passed in stays as it is."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        ratio = check_ratio(getattr(self.args, "loraplus_lr_ratio", None))
        if ratio not in (None, 1) and fresh:
            raise_lora_b(optimizer, self.model, ratio)
        return optimizer
