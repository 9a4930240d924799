"""Qwen 2 and 2.5: biases on q, k and v, a sliding window in some layers."""

from __future__ import annotations

from finegraft.models.families import _decoder as decoder

SPEC = decoder.family("Qwen2", use_sliding_window=True, sliding_window=30, max_window_layers=1)
