"""The official client against a tiny model and its adapters, over a real socket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_tiny import running, save_adapter, save_model

from finegraft import opening
from finegraft.core.errors import ConfigError
from finegraft.inference.generate import complete
from finegraft.serving.engines import Settings, choose

HELLO = [{"role": "user", "content": "hello world"}]
QUESTIONS = [
    [{"role": "user", "content": text}]
    for text in ("hello world", "bye now", "are you so very kind today", "you", "so so so")
]
IDS = ("base", "one", "two")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    base = save_model(root / "base")
    return base, save_adapter(base, root / "one", 1), save_adapter(base, root / "two", 2)


@pytest.fixture(scope="module")
def url(folders):
    base, one, two = folders
    settings = Settings(str(base), adapters={"one": str(one), "two": str(two)}, slots=4)
    with running(choose(settings)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folders):
    """What ``complete`` says of each question, by id."""
    out = {}
    for name, folder in zip(IDS, folders, strict=True):
        opened = opening.open_model(folder)
        out[name] = complete(opened.model, opened.tokenizer, QUESTIONS, max_new_tokens=24)
    assert len({tuple(answers) for answers in out.values()}) == 3  # adapters say something else
    assert all(answer for answers in out.values() for answer in answers)
    return out


def ask(client, model, messages, **more):
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, **{"max_tokens": 24, **more}
    )


def test_models_are_listed_with_their_base(client):
    assert [(m.id, m.parent) for m in client.models.list()] == [
        ("base", None),
        ("one", "base"),
        ("two", "base"),
    ]


def test_greedy_answers_of_every_id_equal_generate(client, expected):
    for name in IDS:
        got = [ask(client, name, q).choices[0].message.content for q in QUESTIONS]
        assert got == expected[name]


def test_many_at_once_get_what_each_gets_alone(client, expected):
    jobs = [(name, number) for name in IDS for number in range(len(QUESTIONS))] * 3
    with ThreadPoolExecutor(20) as pool:
        got = pool.map(lambda job: ask(client, job[0], QUESTIONS[job[1]]), jobs)
    for (name, number), answer in zip(jobs, got, strict=True):
        assert answer.choices[0].message.content == expected[name][number]


def test_streamed_text_is_the_same_text(client, expected):
    chunks = list(ask(client, "one", HELLO, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected["one"][0]
    assert len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == "length"


def test_a_stop_sequence_ends_the_answer_before_itself(client, expected):
    whole = expected["one"][0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = ask(client, "one", HELLO, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    parts = list(ask(client, "one", HELLO, stop=[stop], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in parts) == answer.message.content


def test_log_probabilities_are_those_of_the_model(client, folders):
    import torch

    from finegraft.data.render import render_prompt

    answer = ask(client, "base", HELLO, max_tokens=3, logprobs=True, top_logprobs=2)
    shares = answer.choices[0].logprobs.content
    opened = opening.open_model(folders[0])
    ids = render_prompt(HELLO, opened.tokenizer)
    with torch.no_grad():
        logits = opened.model(input_ids=torch.tensor([ids])).logits[0, -1]
    values, tokens = torch.log_softmax(logits.float(), -1).topk(2)
    # the loaded dtype may be bfloat16, whose logits differ that much between two orders of sums
    assert [t.logprob for t in shares[0].top_logprobs] == pytest.approx(values.tolist(), abs=0.06)
    assert shares[0].token == opened.tokenizer.decode([int(tokens[0])])
    assert shares[0].logprob == shares[0].top_logprobs[0].logprob
    said = b"".join(bytes(token.bytes) for token in shares)
    assert said.decode("utf-8", "replace") == answer.choices[0].message.content
    streamed = ask(client, "base", HELLO, max_tokens=3, logprobs=True, top_logprobs=2, stream=True)
    again = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.logprob for t in again] == [t.logprob for t in shares]


def test_a_seed_repeats_an_answer_whatever_else_runs(client):
    def sampled(seed):
        return client.chat.completions.create(
            model="base", messages=HELLO, seed=seed, temperature=1.5, max_tokens=16
        )

    with ThreadPoolExecutor(12) as pool:
        texts = [a.choices[0].message.content for a in pool.map(sampled, [7] * 6 + [8, 9] * 3)]
    assert len(set(texts[:6])) == 1 and len(set(texts)) > 1


def test_plain_completions(client):
    first = client.completions.create(model="base", prompt="hello", temperature=0, logprobs=1)
    assert first.usage.completion_tokens == 16 or first.choices[0].finish_reason == "stop"
    shares = first.choices[0].logprobs
    assert len(shares.tokens) == len(shares.token_logprobs) == first.usage.completion_tokens
    assert shares.text_offset[1] == len(shares.tokens[0]) and len(shares.top_logprobs[0]) == 1
    parts = client.completions.create(model="base", prompt="hello", temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == first.choices[0].text
    ids = client.completions.create(model="base", prompt=[5, 6, 7], temperature=0, max_tokens=2)
    assert ids.usage.prompt_tokens == 3


def test_biases_and_penalties_change_what_is_said(client):
    def tokens(**more):
        answer = ask(client, "base", HELLO, max_tokens=8, logprobs=True, **more)
        return [token.token for token in answer.choices[0].logprobs.content]

    assert len(set(tokens(logit_bias={"17": 100}))) == 1
    pair = {"17": 100, "18": 99}  # a penalty of 2 for each time makes them take turns
    assert len(set(tokens(logit_bias=pair, frequency_penalty=2))) == 2


def test_what_the_model_cannot_take_is_refused(client):
    cases = {
        "FG-SERVE-020": {"messages": [{"role": "user", "content": "hello " * 400}]},
        "FG-SERVE-021": {
            "messages": HELLO,
            "tools": [{"type": "function", "function": {"name": "look"}}],
        },
        "FG-SERVE-019": {"messages": HELLO, "response_format": {"type": "json_object"}},
    }
    for code, body in cases.items():
        with pytest.raises(openai.BadRequestError, match=code):
            client.chat.completions.create(model="base", **body)
    with pytest.raises(openai.BadRequestError, match="FG-SERVE-022"):
        client.completions.create(model="base", prompt=[1, 10**6])
    with pytest.raises(openai.NotFoundError, match="FG-SERVE-016"):
        ask(client, "three", HELLO)
    huge = [{"role": "user", "content": "x" * 3_000_000}]
    with pytest.raises(openai.BadRequestError, match="FG-SERVE-020"):
        ask(client, "base", huge)


def test_an_answer_fills_the_context_and_no_more(client):
    answer = ask(client, "base", HELLO, max_tokens=None, logit_bias={"17": 100})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 256


def test_an_adapter_folder_brings_its_base(folders):
    _, one, _ = folders
    with (
        running(choose(Settings(str(one), name="mine"))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client,
    ):
        assert [(m.id, m.parent) for m in client.models.list()] == [
            ("mine", "base"),
            ("base", None),
        ]
        texts = [ask(client, name, HELLO).choices[0].message.content for name in ("mine", "base")]
    assert texts[0] != texts[1]


def test_two_models_under_one_name_are_refused(folders):
    base, one, _ = folders
    engine = choose(Settings(str(base), adapters={"base": str(one)}))
    with pytest.raises(ConfigError, match="FG-SERVE-005"), running(engine):
        pass
    engine = choose(Settings(str(base), adapters={"other": str(base)}))
    with pytest.raises(ConfigError, match="FG-SERVE-005"), running(engine):
        pass


def test_engines_are_chosen_by_what_the_model_is(folders, tmp_path):
    base, one, _ = folders
    assert type(choose(Settings(str(base)))).__name__ == "InProcess"
    assert type(choose(Settings(str(one)))).__name__ == "InProcess"
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert type(choose(Settings(str(file)))).__name__ == "LlamaCpp"
    for settings in (
        Settings(str(base), engine="llamacpp"),
        Settings(str(base), engine="vllm"),
        Settings(str(base), engine="encoder"),
        Settings(str(file), adapters={"one": str(one)}),
    ):
        with pytest.raises(ConfigError, match="FG-SERVE-003"):
            choose(settings)
    with pytest.raises(ConfigError, match="FG-CORE-001"):
        choose(Settings(str(base), engine="vlm"))
