"""P-tuning: vectors in front of the embedded row, made by a small network (arXiv:2103.10385).

What: peft's prompt encoder, an MLP or an LSTM over n vectors. How: ``_virtual``. Constraint:
a saved adapter holds the finished vectors, and the network in a file of its own, which training on
needs and answering does not. Trade-off: steadier than prompt tuning, with more to train.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftType, PromptEncoderConfig
from torch import nn

from finegraft.adapters import _virtual
from finegraft.adapters._contract import Method


def attach(
    model: nn.Module,
    *,
    num_virtual_tokens: int = 20,
    encoder_hidden_size: int | None = None,
    encoder_reparameterization_type: str = "MLP",
    encoder_num_layers: int = 2,
    encoder_dropout: float = 0.0,
    task_type: str = "CAUSAL_LM",
    adapter_name: str = "default",
    **settings: Any,
) -> nn.Module:
    """Return ``model`` with new virtual tokens and their network; only they train, and a new head.

    Args:
        num_virtual_tokens: How many vectors.
        encoder_hidden_size: Width of the network; None: that of the model.
        encoder_reparameterization_type: "MLP" or "LSTM".
        encoder_num_layers: Of the LSTM.
        encoder_dropout: Of the LSTM.
        settings: Further fields of peft's ``PromptEncoderConfig``.

    Raises:
        ArgumentError: FG-ARG-001, a setting that peft's configuration does not have.
        AdapterError: FG-ADAPT-036 fewer than one token, FG-ADAPT-039 what peft refuses.
    """
    return _virtual.attach(
        PromptEncoderConfig,
        model,
        task_type,
        adapter_name,
        num_virtual_tokens=num_virtual_tokens,
        encoder_hidden_size=encoder_hidden_size,
        encoder_reparameterization_type=encoder_reparameterization_type.upper(),
        encoder_num_layers=encoder_num_layers,
        encoder_dropout=encoder_dropout,
        **settings,
    )


METHOD = Method(
    summary="virtual tokens made by a small network that trains with them",
    attach=attach,
    peft_type="P_TUNING",
    accelerate=functools.partial(_virtual.accelerate, PeftType.P_TUNING),
    not_mergeable=_virtual.NOT_MERGEABLE,
    not_packed=_virtual.NOT_PACKED,
    not_identity="the virtual tokens are read from the start",
    saves_modules=False,
    tasks=_virtual.TASKS,
    learning_rates={"causal": 1e-3, "classification": 1e-3},
)
