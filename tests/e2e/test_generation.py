"""The real demo model: batches under left padding say, token for token, what single prompts say."""

from __future__ import annotations

import pytest
import torch

from finegraft import FastLanguageModel
from finegraft.data.render import render_prompt
from finegraft.inference import decode
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


TEXT = (
    "The old mill stands at the bend of the river, half a mile below the village. Its wheel has "
    "not turned for forty years, and the swallows have built their nests under the beams."
)


def left_padded(tokenizer, texts):
    rows = [render_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


@pytest.mark.parametrize("count", [1, 8])
def test_the_fast_loop_says_what_transformers_says(demo, count):
    model, tokenizer = demo
    ask = dict(left_padded(tokenizer, PROMPTS[-count:]), max_new_tokens=40, do_sample=False)
    expected = model.eval().generate(**ask)
    FastLanguageModel.for_inference(model)
    assert isinstance(model, decode.FastDecoding)
    try:
        got = model.generate(**ask)
        assert decode._states[model].weights is not None
    finally:
        FastLanguageModel.for_training(model)
    assert torch.equal(got, expected)
    ended = (got[:, -1] == tokenizer.pad_token_id).sum()
    assert count == 1 or 0 < ended < count, "rows should end at different places"


def test_prompt_lookup_copies_a_text_in_fewer_steps(demo, monkeypatch):
    model, tokenizer = demo
    talk = [{"role": "user", "content": f"Copy this text word for word:\n\n{TEXT}"}]
    plain = complete(model, tokenizer, [talk], max_new_tokens=60)
    checks, original = [], decode.Session.check

    def check(session, ids):
        checks.append(len(ids))
        return original(session, ids)

    monkeypatch.setattr(decode.Session, "check", check)
    looked = complete(model, tokenizer, [talk], max_new_tokens=60, prompt_lookup_num_tokens=10)
    assert looked == plain
    assert len(checks) < 40
