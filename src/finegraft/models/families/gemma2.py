"""Gemma 2: capped scores and logits, a sliding window in every second layer."""

from __future__ import annotations

from finegraft.models.families import _gemma as gemma

SPEC = gemma.family(
    "Gemma2", "Gemma2Model", "Gemma2Config", attn_logit_softcapping=5.0, final_logit_softcapping=3.0
)
"""The tiny model's caps are low enough to bend its small scores."""
