"""Prompt tuning: trained vectors in front of the embedded row (arXiv:2104.08691).

What: peft's prompt, started at random, from tokens drawn from the vocabulary, or from a text. How:
``_virtual``. Constraint: a text is cut or repeated to the number of virtual tokens. Trade-off: the
fewest parameters of all methods, and the most dependent on its start: a text beats random numbers.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftType, PromptTuningConfig, PromptTuningInit
from torch import nn

from finegraft.adapters import _virtual
from finegraft.adapters._contract import Method
from finegraft.core.errors import AdapterError
from finegraft.models import swap


def attach(
    model: nn.Module,
    *,
    num_virtual_tokens: int = 20,
    prompt_tuning_init: str | None = None,
    prompt_tuning_init_text: str | None = None,
    tokenizer_name_or_path: str | None = None,
    task_type: str = "CAUSAL_LM",
    adapter_name: str = "default",
    **settings: Any,
) -> nn.Module:
    """Return ``model`` with a new prompt; only the prompt trains, and a new head.

    Args:
        num_virtual_tokens: Length of the prompt.
        prompt_tuning_init: "RANDOM", "SAMPLE_VOCAB" or "TEXT"; None: TEXT where a text is given.
        prompt_tuning_init_text: What the task is, in words; the prompt starts as its embedding.
        tokenizer_name_or_path: Reads the text; None: the tokenizer in the base's own folder.
        settings: Further fields of peft's ``PromptTuningConfig``.

    Raises:
        ArgumentError: FG-ARG-001, a setting that peft's configuration does not have.
        AdapterError: FG-ADAPT-036 fewer than one token, FG-ADAPT-038 a start that is unknown or
            lacks its text, FG-ADAPT-039 what peft refuses.
    """
    start = _start(prompt_tuning_init, prompt_tuning_init_text)
    settings["num_virtual_tokens"] = num_virtual_tokens
    if start == PromptTuningInit.TEXT:
        base: Any = swap.core(model)
        settings["prompt_tuning_init_text"] = prompt_tuning_init_text
        settings["tokenizer_name_or_path"] = tokenizer_name_or_path or base.config.name_or_path
    wrapped: Any = _virtual.attach(
        PromptTuningConfig,
        model,
        task_type,
        adapter_name,
        prompt_tuning_init=start,
        **settings,
    )
    # A start is needed once. Left as TEXT, the saved folder would ask for the tokenizer at this
    # machine's path when it is opened for training elsewhere.
    wrapped.peft_config[adapter_name].prompt_tuning_init = PromptTuningInit.RANDOM
    return wrapped


def _start(name: str | None, text: str | None) -> PromptTuningInit:
    known = [start.value for start in PromptTuningInit]
    wanted = str(getattr(name, "value", name) or ("TEXT" if text else "RANDOM")).upper()
    if wanted not in known or (wanted == "TEXT") != bool(text):
        raise AdapterError(
            "FG-ADAPT-038",
            f"prompt_tuning_init={name!r} with prompt_tuning_init_text={text!r}",
            allowed=f"{', '.join(known)}; a text with TEXT and with nothing else",
            fix="prompt_tuning_init_text='Answer as a pirate would:' alone is enough",
        )
    return PromptTuningInit(wanted)


METHOD = Method(
    summary="trained vectors in front of the embedded row; the fewest parameters",
    attach=attach,
    peft_type="PROMPT_TUNING",
    accelerate=functools.partial(_virtual.accelerate, PeftType.PROMPT_TUNING),
    not_mergeable=_virtual.NOT_MERGEABLE,
    not_packed=_virtual.NOT_PACKED,
    not_identity="the prompt is read like tokens from the start",
    saves_modules=False,
    tasks=_virtual.TASKS,
    learning_rates={"causal": 3e-2, "classification": 3e-2},
)
