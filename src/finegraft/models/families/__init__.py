"""Families of models, one file each, named after ``config.model_type``.

What: ``apply`` swaps the modules of a known family to fast classes; an unknown family stays stock
and the report says so. Constraint: dispatch is on ``model_type`` and on exact module classes.
"""

from __future__ import annotations

from torch import nn

from finegraft.core.registry import Registry
from finegraft.models import flat, swap, together
from finegraft.models.families._contract import Family

__all__ = ["FAMILIES", "Family", "apply", "is_padding_free"]

FAMILIES: Registry[Family] = Registry("finegraft.models.families", "SPEC", "family")


def apply(model: nn.Module) -> int:
    """Swap the modules of ``model`` (itself or what peft wraps); return how many are fast."""
    core, decoder = swap.core(model), swap.decoder(model)
    config = core.config.get_text_config()
    if config.model_type not in FAMILIES.names():
        swap.refuse(decoder, f"no family file for model_type '{config.model_type}'")
        return 0
    family = FAMILIES.get(config.model_type)
    reason = family.refuses(config)
    if reason is not None:
        swap.refuse(decoder, reason)
        return 0
    count = 0
    for module in core.modules():
        make = family.swaps.get(type(module).__name__)
        if make is not None and swap.swap(module, make(type(module))):
            count += 1
            names = getattr(module, "together", ())
            if names:
                together.stack([getattr(module, name) for name in names])
    return count


def is_padding_free(model: nn.Module) -> bool:
    """Whether the model takes flat batches: documents behind one another, no padding."""
    decoder = swap.decoder(model)
    here = flat.runs_on(next(decoder.parameters()).device)
    return here and swap.is_swapped(decoder) and getattr(decoder, "takes_documents", False)
