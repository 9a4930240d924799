"""Longer contexts than a model was trained on: only when asked for.

What: ``apply`` puts a rotary scaling into a configuration and compares lengths. How: it writes
transformers' ``rope_parameters``; formulas are transformers' own. Constraint: a length alone never
changes a model's numbers. Trade-off: a script that relied on automatic scaling gets one warning and
must name the scaling it wants.

Source: linear, https://arxiv.org/abs/2306.15595; yarn (and dynamic), https://arxiv.org/abs/2309.00071
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

_TYPES = ("linear", "dynamic", "yarn")


def _wrong(found: str) -> ConfigError:
    return ConfigError(
        "FG-MODEL-011",
        found,
        allowed=f'{{"rope_type": one of {", ".join(_TYPES)}, "factor": a number above 1}}',
        fix='for twice the length: rope_scaling={"rope_type": "linear", "factor": 2.0}',
    )


def apply(
    config: PreTrainedConfig, rope_scaling: dict[str, Any] | None, max_seq_length: int | None
) -> None:
    """Set ``rope_scaling`` on ``config``, and warn of a length beyond what the model knows.

    Args:
        config: Changed in place.
        rope_scaling: What the user passed; ``type`` is read as ``rope_type``.
        max_seq_length: In tokens.

    Raises:
        ConfigError: FG-MODEL-011, not a scaling, or the model has no rotary embedding.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if rope_scaling:
        factor = _scale(text, dict(rope_scaling))
        known = int(known * factor) if known else known
    if known and max_seq_length and max_seq_length > known:
        log.warning(
            "max_seq_length is %d and the model knows %d positions%s",
            max_seq_length,
            known,
            "; rope_scaling extends them" if getattr(text, "rope_parameters", None) else "",
        )


def _scale(text: PreTrainedConfig, wanted: dict[str, Any]) -> float:
    current = getattr(text, "rope_parameters", None)
    if not current:
        raise _wrong(f"rope_scaling is set, but '{text.model_type}' has no rotary embedding")
    kind = wanted.pop("type", None)
    kind = wanted.setdefault("rope_type", kind)
    factor = wanted.get("factor")
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if kind not in _TYPES or not number or factor <= 1:
        raise _wrong(f"rope_scaling is {wanted!r}")
    if kind == "yarn":
        wanted.setdefault("original_max_position_embeddings", text.max_position_embeddings)
    if any(isinstance(value, dict) for value in current.values()):
        # one set of parameters per attention kind; sliding windows never see the long distances
        full = current.get("full_attention")
        if full is None:
            raise _wrong(f"rope_scaling does not fit the layers of '{text.model_type}'")
        text.rope_parameters = {**current, "full_attention": {**full, **wanted}}
    else:
        text.rope_parameters = {**current, **wanted}
    if kind != "dynamic":  # dynamic scaling starts where this value ends
        text.max_position_embeddings = int(text.max_position_embeddings * factor)
    return float(factor)
