"""A tiny Llama and its tokenizer, shared by the tests of training and adapters."""

from __future__ import annotations

from typing import Any

import torch
from test_data_tiny import tiny
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["hello", "world", "bye", "now", "you", "are", "so", "very", "kind", "today"]


def tokenizer() -> Any:
    return tiny()


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Two layers, grouped-query attention, 600 tokens of vocabulary."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


def rows(count: int = 12) -> list[dict[str, str]]:
    """Prompt/completion rows of ragged lengths."""
    out = []
    for i in range(count):
        prompt = " ".join(WORDS[(i + j) % 10] for j in range(2 + i % 5))
        completion = " ".join(WORDS[(i * 3 + j) % 10] for j in range(1 + i % 7))
        out.append({"prompt": prompt, "completion": completion})
    return out
