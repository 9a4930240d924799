"""Llama 2 and 3, SmolLM2, TinyLlama, Yi, and whatever else says ``model_type: llama``."""

from __future__ import annotations

from typing import Any

from finegraft.models.families import _decoder as decoder
from finegraft.models.families._contract import Family


def tiny() -> Any:
    """Two layers with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=131,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
    )


SPEC = Family(
    swaps={
        "LlamaModel": decoder.fast(decoder.DocumentModel),
        "LlamaAttention": decoder.fast(decoder.DocumentAttention),
        "LlamaMLP": decoder.fast(decoder.FusedGatedMlp),
        "LlamaRMSNorm": decoder.fast(decoder.FusedRmsNorm),
    },
    refuses=decoder.refuses,
    tiny=tiny,
)
