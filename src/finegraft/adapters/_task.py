"""The task that an adapter is for, by its name in any script or by the model's class.

Constraint: a model whose class says nothing is an error and never a guess.
"""

from __future__ import annotations

from typing import Any

from peft import TaskType
from torch import nn

from finegraft.adapters._contract import CAUSAL, SEQUENCE, TOKEN
from finegraft.core.errors import AdapterError, did_you_mean
from finegraft.models import swap

_WORDS = {
    "text-generation": CAUSAL,
    "causal-lm": CAUSAL,
    "causal": CAUSAL,
    "classification": SEQUENCE,
    "text-classification": SEQUENCE,
    "sequence-classification": SEQUENCE,
    "token-classification": TOKEN,
    "ner": TOKEN,
}
_ENDINGS = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForSequenceClassification": SEQUENCE,
    "ForTokenClassification": TOKEN,
}


def task_named(name: Any) -> str | None:
    """peft's name of a task; None stays None.

    Raises:
        AdapterError: FG-ADAPT-043, no such task.
    """
    if name is None:
        return None
    text = str(getattr(name, "value", name))
    known = [task.value for task in TaskType]
    found = text.upper() if text.upper() in known else _WORDS.get(text.lower().replace("_", "-"))
    if found is None:
        raise AdapterError(
            "FG-ADAPT-043",
            f"task_type={text!r}",
            allowed=", ".join([*known, *_WORDS]),
            fix=f"leave it out, which reads it off the model, or {did_you_mean(text, _WORDS)}",
        )
    return found


def task_of(model: nn.Module) -> str:
    """The task that the class of ``model`` is made for.

    Raises:
        AdapterError: FG-ADAPT-042, its class has no head or one of another kind.
    """
    core: Any = swap.core(model)
    name = swap.stock_class(core).__name__
    if name.endswith("ForConditionalGeneration") and not core.config.is_encoder_decoder:
        return CAUSAL
    for ending, task in _ENDINGS.items():
        if name.endswith(ending):
            return task
    raise AdapterError(
        "FG-ADAPT-042",
        f"{name} does not say what it is to be trained for",
        allowed="a class ending in " + ", ".join(_ENDINGS),
        fix="load it with AutoModelForCausalLM or AutoModelForSequenceClassification, or pass "
        f"task_type='{CAUSAL}'",
    )
