"""What every tuning method exports as ``METHOD``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

CAUSAL = "CAUSAL_LM"
SEQUENCE = "SEQ_CLS"
TOKEN = "TOKEN_CLS"
TASKS = (CAUSAL, SEQUENCE, TOKEN)


def _nothing(model: nn.Module) -> int:
    return 0


@dataclass(frozen=True)
class Method:
    """One way of tuning.

    Attributes:
        summary: One line for help texts, docs and the ladder.
        attach: ``attach(model, *, task_type=..., adapter_name=..., **settings)`` returns the model
            with a new, trainable adapter; nothing else trains, but for a classifier's new head.
        peft_type: The value of ``peft_type`` in the saved configuration, None where no adapter is
            made and the model itself is saved.
        accelerate: Swaps the adapter's layers inside a model to fast classes; returns how many.
        not_mergeable: Why the adapter cannot be merged into the base, or None when it can.
        not_quantized: Why it cannot train on a 4-bit or 8-bit base, or None when it can.
        not_packed: Why rows cannot be packed or flattened (padding-free), or None when they can.
        not_recomputed: Why layers cannot be recomputed in backward, or None when they can.
        not_identity: Why a fresh adapter changes the model's output, or None when it does not.
        saves_modules: Whether ``attach`` takes ``modules_to_save``, to train and save them whole.
        in_peft: Whether plain peft opens the saved folder; if not, after importing
            ``finegraft.peft_plugin``.
        keys: Keys of ``TrainConfig`` that ``attach`` takes; others come in ``method_settings``.
        tasks: Values of ``task_type`` that it can be attached for.
        variants: Short names for this method with some settings, ``dora`` say.
        learning_rates: Where a comparison of methods starts, by task: peak learning rates for runs
            of some hundred steps.
    """

    summary: str
    attach: Callable[..., nn.Module]
    peft_type: str | None
    accelerate: Callable[[nn.Module], int] = _nothing
    not_mergeable: str | None = None
    not_quantized: str | None = None
    not_packed: str | None = None
    not_recomputed: str | None = None
    not_identity: str | None = None
    saves_modules: bool = True
    in_peft: bool = True
    keys: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(
        default_factory=lambda: {"causal": 1e-3, "classification": 1e-3}
    )
