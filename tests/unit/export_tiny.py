"""A tiny run, its export, and ways to spoil one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from training_tiny import llama, rows
from training_tiny import tokenizer as tiny_tokenizer

from finegraft import FastLanguageModel
from finegraft.data.prepare import prepare  # noqa: F401  (the same rendering as training)


def base(folder: Path, **changes: Any) -> Path:
    """A random llama whose layers matter, in bfloat16, with a tokenizer."""
    model = llama(hidden_size=64, intermediate_size=96, **changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(6 if "self_attn" in name else 3)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, *, dtype: str = "float32", seed: int = 7, **settings: Any) -> Any:
    """A model with a LoRA that has moved far from its start, and the tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype=dtype)
    settings = {"r": 4, "lora_alpha": 8, **settings}
    model = FastLanguageModel.get_peft_model(model, **settings)
    return moved(model, seed), tokenizer


def moved(model: Any, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.15)
    return model.eval()


def adapter(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save as a run's adapter is saved."""
    from finegraft import opening

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    opening.write_note(model, folder)
    return folder


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


def write_rows(file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    return file
