"""Qwen 3: RMS norm on each head of q and k before the rotation."""

from __future__ import annotations

from finegraft.models.families import _decoder as decoder

SPEC = decoder.family("Qwen3", head_dim=16)
