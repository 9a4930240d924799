"""Gemma 3's language model: norms on q and k, local layers with their own rotation."""

from __future__ import annotations

from finegraft.models.families import _gemma as gemma

SPEC = gemma.family(
    "Gemma3",
    "Gemma3TextModel",
    "Gemma3TextConfig",
    layer_types=["sliding_attention", "full_attention"],
)
