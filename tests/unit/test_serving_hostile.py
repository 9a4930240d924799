"""Thousands of wrong requests: each gets an answer, and none of them is 5xx."""

from __future__ import annotations

import http.client
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_tiny import Scripted, running, save_model, send

from finegraft.serving.engines import Settings, choose
from finegraft.serving.requests import Chat, Completion, Embeddings

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
FIELDS = sorted({*Chat.model_fields, *Completion.model_fields, *Embeddings.model_fields, "nope"})
GOOD = {
    "messages": [{"role": "user", "content": "hello"}],
    "prompt": "hello",
    "input": "hello",
    "max_tokens": 2,
}
NUMBERS = [-1, 0, 1, 2**31, 2**63, 2**64, 10**30, -0.0, 1e308, float("nan"), float("inf")]
WORDS = ["", "\x00", "\ud800", "\U0001f600", "{{7*7}}", "{% raise %}", "<|im_end|>", "../../x"]
ODD = st.sampled_from([*NUMBERS, *WORDS, "base"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "x", ""]) | ODD
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=30) | VALUES}), max_size=4
)
BODIES = st.tuples(
    st.sets(st.sampled_from(sorted(GOOD)), max_size=2),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    st.none() | MESSAGES,
)
QUICK = settings(
    max_examples=700, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
LONG = settings(QUICK, max_examples=20_000)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    base = save_model(tmp_path_factory.mktemp("hostile") / "base")
    with running(choose(Settings(str(base), context=40))) as address:
        yield address
        assert json.loads(send(address, "/health")[2])["running"] == 0


@pytest.fixture(scope="module")
def connection(url):
    made = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    yield made
    made.close()


def ask(connection, path, data, kind="application/json", method="POST"):
    """Send bytes; the answer has the API's shape."""
    headers = {"Content-Type": kind} if kind is not None else {}
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status < 500, (path, data, answer.status, body)
    if answer.status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return answer.status


def wrong_bodies(connection, path, parts):
    left_out, changed, messages = parts
    body = {key: value for key, value in GOOD.items() if key not in left_out}
    body = {key: value for key, value in body.items() if fits(path, key)} | changed
    if messages is not None and path == PATHS[0]:
        body["messages"] = messages
    ask(connection, path, json.dumps(body).encode("utf-8", "surrogatepass"))


def fits(path, key):
    own = {"messages": PATHS[0], "prompt": PATHS[1], "input": PATHS[2]}.get(key)
    return own == path or (own is None and path != PATHS[2])


@QUICK
@given(path=st.sampled_from(PATHS), parts=BODIES)
def test_wrong_values(connection, path, parts):
    wrong_bodies(connection, path, parts)


@pytest.mark.slow
@LONG
@given(path=st.sampled_from(PATHS), parts=BODIES)
def test_twenty_thousand_wrong_values(connection, path, parts):
    wrong_bodies(connection, path, parts)


@QUICK
@given(
    path=st.sampled_from(PATHS),
    data=st.binary(max_size=200)
    | st.text(max_size=100).map(lambda t: t.encode("utf-8", "replace")),
    kind=st.sampled_from(["application/json", "text/plain", "", "application/json; charset=utf-7"]),
)
def test_bytes_that_are_not_json(connection, path, data, kind):
    assert ask(connection, path, data, kind) >= 400


@QUICK
@given(
    path=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=40),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
)
def test_paths_and_methods(connection, path, method):
    quoted = "".join(c if c not in "#?" else "%23" for c in path)
    ask(connection, f"/{quoted}", b"{}" if method == "POST" else None, method=method)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages":[{"role":"user","content":"hi"}],"response_format":'
        + b'{"a":' * 300
        + b"1"
        + b"}" * 300
        + b"}",
        b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
        b'{"messages":[{"role":"user","content":"\\ud83d"}]}',
        b'{"\\ud800":1,"messages":[]}',
        b'{"seed":' + b"9" * 5000 + b"}",
        b'{"messages":[{"role":"user","content":"' + b"a" * 3_000_000 + b'"}]}',
        b'{"messages":[{"role":"user","content":"' + b"\\u0000" * 100 + b'"}],"max_tokens":1}',
        b'{"messages":[' + b'{"role":"user","content":"a"},' * 9_000 + b"1]}",
        b"\xef\xbb\xbf{}",
        b"null",
        b"",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_bodies_made_to_hurt(url, data):
    for path in PATHS[:2]:
        status, _, body = send(url, path, data)
        assert status < 500 and (status < 400 or "error" in json.loads(body))


@pytest.fixture
def fuzzer(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("serve_fuzz")


def test_raw_requests_of_every_kind(url, fuzzer):
    """The first few hundred of what ``benchmarks/serve_fuzz.py`` sends a hundred thousand of."""
    found = fuzzer.fuzz(url, 600)
    assert found.problems == []
    assert {"200", "400", "404", "405", "415", "hung up"} <= set(found.statuses)
    assert sum(found.statuses.values()) == 600


def test_the_fuzzer_notices_what_it_is_for(fuzzer):
    class Broken:
        """Says 500 to everybody."""

        async def __call__(self, scope, receive, send):
            start = {"type": "http.response.start", "status": 500, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": b'{"choices": [{"text": "x"}]}'})

    engine = Scripted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving_tiny.build", lambda *_, **__: Broken())
        with running(engine) as address:
            found = fuzzer.fuzz(address, 20)
    assert any("status 500" in problem for problem in found.problems)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--gguf"]], ids=["inprocess", "llamacpp"])
def test_a_hundred_thousand_raw_requests(more):
    script = Path(__file__).parents[2] / "benchmarks" / "serve_fuzz.py"
    words = [sys.executable, str(script), "--requests", "100000", *more]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["requests"] == 100_000


def test_answers_are_those_of_the_openapi_document(url, tmp_path):
    """Schemathesis makes requests from the document, and holds the answers against it."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    words = ["run", f"{url}/openapi.json", f"--checks={checks},response_schema_conformance"]
    words += ["--max-examples=15", "--phases=coverage,fuzzing", "--seed=1", "--no-color"]
    done = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
