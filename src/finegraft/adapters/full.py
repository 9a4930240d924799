"""Full fine-tuning: every weight trains and the model itself is saved.

What: no adapter; ``method: full`` is ``full_finetuning: true`` under the name of a method.
Constraint: 4-bit and 8-bit weights have no gradient, so a quantized base is refused. Trade-off: as
much memory for gradients and twice as much for the optimizer's state as the weights take.
"""

from __future__ import annotations

from torch import nn

from finegraft.adapters._contract import Method


def attach(
    model: nn.Module, *, task_type: str = "CAUSAL_LM", adapter_name: str = "default"
) -> nn.Module:
    """Let every weight of ``model`` train, and return it."""
    return model.requires_grad_(True)


METHOD = Method(
    summary="every weight trains; the model itself is saved",
    attach=attach,
    peft_type=None,
    not_mergeable="there is no adapter: the saved model is the result",
    saves_modules=False,
    not_quantized="its weights are whole numbers, which have no gradient",
    learning_rates={"causal": 5e-5, "classification": 5e-5},
)
