"""Phi-3 and Phi-3.5: fused qkv and gate_up projections, partial rotary in some sizes."""

from __future__ import annotations

from finegraft.models.families import _decoder as decoder

SPEC = decoder.family("Phi3", fused=True, sliding_window=30, eos_token_id=2, bos_token_id=1)
