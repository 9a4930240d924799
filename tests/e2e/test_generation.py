"""The real demo model: batches under left padding say, token for token, what single prompts say."""

from __future__ import annotations

import pytest
import torch

from finegraft import FastLanguageModel
from finegraft.inference.generate import complete

PROMPTS = [
    "Hi!",
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about a river that runs past an old mill in the mountains.",
    "Count from one to five.",
    "Translate 'good morning' into Spanish, please.",
    "Why is the sky blue? Answer briefly, in plain words that a child of seven would understand.",
    "Say yes.",
]


@pytest.fixture(scope="module")
def demo():
    return FastLanguageModel.from_pretrained("demo", dtype=torch.float32)


def test_a_left_padded_batch_equals_one_by_one(demo):
    model, tokenizer = demo
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    together = complete(model, tokenizer, talks, max_new_tokens=16, batch_size=8)
    alone = [complete(model, tokenizer, [talk], max_new_tokens=16)[0] for talk in talks]
    assert together == alone
    assert "Paris" in together[1]
    assert len(set(together)) == len(PROMPTS)


def test_the_pad_token_is_not_the_end_token(demo):
    model, tokenizer = demo
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|im_end|>"
