"""Prefix tuning: trained keys and values in front of every layer (arXiv:2101.00190).

What: peft's prefix; each layer's attention reads n more keys and values than the row has. How:
``_virtual``. Constraint: the prefix travels as a cache, so layers cannot be recomputed in backward
and models without a cache take none. Trade-off: with ``prefix_projection`` a small network makes
the prefix, which trains more steadily and has many times the parameters; only its result is needed
for answering.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftType, PrefixTuningConfig
from torch import nn

from finegraft.adapters import _virtual
from finegraft.adapters._contract import Method


def attach(
    model: nn.Module,
    *,
    num_virtual_tokens: int = 20,
    prefix_projection: bool = False,
    encoder_hidden_size: int | None = None,
    init_weights: str | None = "zero",
    task_type: str = "CAUSAL_LM",
    adapter_name: str = "default",
    **settings: Any,
) -> nn.Module:
    """Return ``model`` with a new prefix; only the prefix trains, and a new head.

    Args:
        num_virtual_tokens: Keys and values a layer gets.
        prefix_projection: Make them with a network of two layers.
        encoder_hidden_size: Width of that network; None: that of a layer's keys.
        init_weights: "zero" starts with keys and values of zero; None at random, peft's default,
            which costs much of what the base knows: on SmolLM2-135M the first loss is 8.7 instead
            of 3.3, and after 20 steps of the same training 2.3 instead of 1.6.
        settings: Further fields of peft's ``PrefixTuningConfig``.

    Raises:
        ArgumentError: FG-ARG-001, a setting that peft's configuration does not have.
        AdapterError: FG-ADAPT-034 gradient checkpointing is on, FG-ADAPT-036 fewer than one token,
            FG-ADAPT-037 a model without a cache, FG-ADAPT-039 what peft refuses.
    """
    return _virtual.attach(
        PrefixTuningConfig,
        model,
        task_type,
        adapter_name,
        num_virtual_tokens=num_virtual_tokens,
        prefix_projection=prefix_projection,
        encoder_hidden_size=encoder_hidden_size,
        init_weights=init_weights,
        **settings,
    )


METHOD = Method(
    summary="trained keys and values in front of every layer's attention",
    attach=attach,
    peft_type="PREFIX_TUNING",
    accelerate=functools.partial(_virtual.accelerate, PeftType.PREFIX_TUNING),
    not_mergeable=_virtual.NOT_MERGEABLE,
    not_packed=_virtual.NOT_PACKED,
    not_recomputed=_virtual.NOT_RECOMPUTED,
    not_identity="a prefix takes a share of every layer's attention from the start",
    saves_modules=False,
    tasks=_virtual.TASKS,
    learning_rates={"causal": 2e-2, "classification": 1e-2},
)
