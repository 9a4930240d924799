"""Mistral: the Llama shape with a sliding window in every layer."""

from __future__ import annotations

from finegraft.models.families import _decoder as decoder

SPEC = decoder.family("Mistral", sliding_window=30, head_dim=8)
