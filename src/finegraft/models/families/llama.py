"""Llama 2 and 3, SmolLM2, TinyLlama, Yi, and whatever else says ``model_type: llama``."""

from __future__ import annotations

from finegraft.models.families import _decoder as decoder

SPEC = decoder.family("Llama")
