"""Small models for the tests of GGUF: numbers from numpy's fixed generator, saved as folders.

Used by the tests and by ``tools/make_gguf_hashes.py``, which gives the same folders to llama.cpp's
converter and quantizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 256,
    "long_factor": [1.0 + i / 4 for i in range(16)],
    "short_factor": [1.0 + i / 16 for i in range(16)],
}
_COMMON = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
# name -> (prefix of transformers' classes, settings, dtype)
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    # deep enough for every rule about first, last and every third layer; four queries to a key
    "llama": (
        "Llama",
        {"num_hidden_layers": 17, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
        torch.bfloat16,
    ),
    # rows of 192 and 320 are no multiples of 256
    "narrow": (
        "Llama",
        {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6,
         "num_key_value_heads": 2, "tie_word_embeddings": True},
        torch.float32,
    ),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}, torch.float32),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, torch.float32),
    "qwen3": ("Qwen3", {"head_dim": 64}, torch.float32),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 64}, torch.float32),
    "gemma3": ("Gemma3", {**_GEMMA, "sliding_window": 64, "num_hidden_layers": 7}, torch.float32),
    "phi3": ("Phi3", {"sliding_window": None}, torch.float32),
    "phi3_long": (
        "Phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 256, "sliding_window": 300},
        torch.float32,
    ),
    "bert": ("Bert", {}, torch.float32),
}  # fmt: skip
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_CLASSES = {"Bert": "BertModel"}


def fill(model: torch.nn.Module, seed: int = 0, scale: float = 0.06) -> Any:
    """Give every parameter numbers that no release of torch changes."""
    generator = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = generator.standard_normal(tuple(parameter.shape)).astype(np.float32)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            offset = 1.0 if is_gain and "gemma" not in type(model).__name__.lower() else 0.0
            parameter.copy_(torch.from_numpy(values * scale + offset))
    return model


def model(name: str, **changes: Any) -> Any:
    """The model called ``name``, in eval mode."""
    import transformers

    prefix, settings, dtype = MODELS[name]
    config = getattr(transformers, _CONFIGS.get(prefix, f"{prefix}Config"))
    made = getattr(transformers, _CLASSES.get(prefix, f"{prefix}ForCausalLM"))(
        config(**{**_COMMON, **settings, **changes})
    )
    for parameter in fill(made).parameters():  # buffers stay float32, as they do after loading
        parameter.data = parameter.data.to(dtype)
    return made.eval()


def save(name: str, folder: Path) -> Path:
    """Save the model called ``name``, without a tokenizer."""
    model(name).save_pretrained(folder)
    return folder


def save_lora(folder: Path, *, layers: int = 17, rank: int = 8, **settings: Any) -> Path:
    """Save a LoRA adapter for the model ``llama``, as peft does."""
    from safetensors.torch import save_file

    width, keys, inner = 256, 64, 512
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    generator = np.random.RandomState(1)
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora_"
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = generator.standard_normal(shape).astype(np.float32) * 0.1
                tensors[f"{name}{part}.weight"] = torch.from_numpy(values)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 16,
        "bias": "none",
        "target_modules": sorted(name.rpartition(".")[2] for name in shapes),
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
