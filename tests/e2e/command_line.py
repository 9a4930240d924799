"""A tiny model and rows on the disk, and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COMMAND = [str(Path(sys.executable).with_name("finegraft"))]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_model(folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Save a random llama of two layers with a byte tokenizer and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **sizes}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict] | int = 32) -> Path:
    """Write rows, or that many questions about sums, one JSON object a line."""
    if isinstance(rows, int):
        rows = [{"prompt": f"{i} and {i}?", "completion": f"It is {2 * i}."} for i in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def environment(**extra: str) -> dict[str, str]:
    """One thread, 80 columns, nothing of the hub but what ``extra`` says."""
    dropped = ("FINEGRAFT_DEBUG", "HF_", "HUGGING", "TRANSFORMERS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "HF_ENDPOINT": NOWHERE, **extra}


NOWHERE = "http://127.0.0.1:9"  # a port that refuses


def finegraft(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one command line to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
