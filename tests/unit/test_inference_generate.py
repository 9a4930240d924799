"""Answers do not depend on the batch, the padding side or on who watches."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finegraft.core.errors import ConfigError, DataError
from finegraft.inference import generate

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="right",
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float()


@pytest.fixture(autouse=True)
def plain_prompts(monkeypatch):
    """A renderer without a template: what is tested here starts behind it."""

    def render(messages, tokenizer, tools=None):
        return [1, *tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]]

    monkeypatch.setattr(generate, "render_prompt", render)


def conversations(count=8):
    words = [[f"w{(7 * i + 3 * j) % 61}" for j in range(1 + 4 * i)] for i in range(count)]
    return [[{"role": "user", "content": " ".join(line)}] for line in words]


def test_a_batch_answers_as_one_by_one(model, tokenizer):
    talks = conversations()
    together = generate.complete(model, tokenizer, talks, max_new_tokens=24)
    alone = [generate.complete(model, tokenizer, [t], max_new_tokens=24)[0] for t in talks]
    assert together == alone
    assert len(set(together)) > 4, "a model that answers everything alike would prove nothing"


def test_answers_come_back_in_the_order_of_the_questions(model, tokenizer):
    talks = conversations()
    forward = generate.complete(model, tokenizer, talks, max_new_tokens=8, batch_size=3)
    backward = generate.complete(model, tokenizer, talks[::-1], max_new_tokens=8, batch_size=3)
    assert forward == backward[::-1]


def test_one_step_is_the_argmax_of_a_plain_forward(model, tokenizer):
    talks = conversations(4)
    got = generate.complete(model, tokenizer, talks, max_new_tokens=1)
    for talk, text in zip(talks, got, strict=True):
        ids = torch.tensor([generate.render_prompt(talk, tokenizer)])
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax().item()
        assert text == ("" if token == 2 else WORDS[token])


def test_an_answer_ends_at_the_stop_token_even_when_it_is_the_padding(model, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    talks = conversations()
    free = generate.complete(model, tokenizer, talks, max_new_tokens=6)
    word = next(text.split()[2] for text in free if len(text.split()) > 3)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2, WORDS.index(word)]
    try:
        stopped = generate.complete(model, tokenizer, talks, max_new_tokens=6)
    finally:
        model.generation_config.eos_token_id = before
    expected = [list(itertools.takewhile(lambda w: w != word, text.split())) for text in free]
    assert stopped == [" ".join(words) for words in expected]
    assert stopped != free


def test_model_and_tokenizer_are_left_as_they_were(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    generate.complete(model, tokenizer, conversations(2), max_new_tokens=2)
    list(generate.stream(model, tokenizer, conversations(2)[1], max_new_tokens=2))
    assert [m.training for m in model.modules()] == flags
    assert tokenizer.padding_side == "right"
    model.eval()


def test_stream_joined_is_complete(model, tokenizer):
    for talk in conversations(4):
        pieces = list(generate.stream(model, tokenizer, talk, max_new_tokens=12))
        assert "".join(pieces) == generate.complete(model, tokenizer, [talk], max_new_tokens=12)[0]
        assert len(pieces) > 3


def test_closing_a_stream_stops_the_model(model, tokenizer):
    talks = conversations(12)
    lengths = [
        len(t.split()) for t in generate.complete(model, tokenizer, talks, max_new_tokens=40)
    ]
    assert max(lengths) == 40, "no answer is long enough to be stopped"
    model.train()
    calls = []

    def slow(*_):
        calls.append(1)
        time.sleep(0.01)

    hook = model.register_forward_hook(slow)
    answer = generate.stream(model, tokenizer, talks[lengths.index(40)], max_new_tokens=40)
    next(answer)
    answer.close()
    hook.remove()
    assert len(calls) < 20
    assert model.training
    assert not [t for t in threading.enumerate() if t.name.startswith("finegraft-stream")]
    model.eval()


def test_an_error_in_the_model_reaches_the_reader_of_the_stream(model, tokenizer):
    def fail(*_):
        raise RuntimeError("broken on purpose")

    hook = model.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            list(generate.stream(model, tokenizer, conversations(1)[0], max_new_tokens=4))
    finally:
        hook.remove()


def test_a_seed_repeats_samples_and_leaves_the_callers_numbers_alone(model, tokenizer):
    ask = dict(max_new_tokens=16, temperature=1.5, top_p=0.95)
    talks = conversations(3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate.complete(model, tokenizer, talks, seed=1, **ask)
    assert torch.equal(torch.rand(3), expected)
    assert generate.complete(model, tokenizer, talks, seed=1, **ask) == first
    assert generate.complete(model, tokenizer, talks, seed=2, **ask) != first


def test_sampling_ignores_the_options_of_the_models_author(model, tokenizer):
    ask = dict(max_new_tokens=16, temperature=1.5, seed=1)
    talks = conversations(3)
    plain = generate.complete(model, tokenizer, talks, **ask)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    try:
        assert generate.complete(model, tokenizer, talks, **ask) == plain
    finally:
        model.generation_config.top_k = model.generation_config.repetition_penalty = None


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = list(generate._pieces(Bytes(), iter("aé€b".encode()), None))
    assert pieces == ["a", "é", "€", "b"]


def test_a_prompt_beyond_the_context_is_refused(model, tokenizer):
    long = [[{"role": "user", "content": " ".join(["w1"] * 200)}]]
    with pytest.raises(DataError, match="FG-GEN-001"):
        generate.complete(model, tokenizer, long)
    with pytest.raises(DataError, match="FG-GEN-001"):
        generate.stream(model, tokenizer, long[0])


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}])
def test_numbers_out_of_range_are_refused(model, tokenizer, wrong):
    with pytest.raises(ConfigError, match="FG-GEN-002"):
        generate.complete(model, tokenizer, conversations(1), **wrong)
