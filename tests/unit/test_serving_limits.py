"""Queue, time, size, keys and disconnects, over real sockets with an engine that only waits."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_tiny import Scripted, code, running, send, wait_for

from finegraft.core.errors import ConfigError
from finegraft.serving import guard, run
from finegraft.serving.app import Limits

ASK = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def quick():
    with running(Scripted()) as url:
        yield url


def open_stream(url: str) -> socket.socket:
    """A client that has read the beginning of its stream."""
    client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10)
    body = json.dumps({**ASK, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert client.recv(100).startswith(b"HTTP/1.1 200")
    return client


def test_an_answer_is_the_same_in_one_piece_and_streamed(quick):
    status, headers, body = send(quick, CHAT, {**ASK, "model": "tuned"})
    assert status == 200
    answer = json.loads(body)
    assert answer["choices"][0]["message"]["content"] == "tuned0 tuned1 tuned2 "
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    usage = {"include_usage": True}
    _, headers, body = send(
        quick, CHAT, {**ASK, "model": "tuned", "stream": True, "stream_options": usage}
    )
    assert headers["content-type"].startswith("text/event-stream")
    *events, done = [line[6:] for line in body.decode().split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == "tuned0 tuned1 tuned2 "
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == answer["usage"] and chunks[-1]["choices"] == []
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}


def test_a_client_that_hangs_up_frees_its_place_at_once():
    engine = Scripted(words=1000, pause=0.05, slots=1)
    with running(engine, limits=Limits(waiting=0)) as url:
        client = open_stream(url)
        assert engine.open == 1
        assert code(send(url, CHAT, ASK)) == (429, "FG-SERVE-010")
        client.close()
        assert wait_for(lambda: engine.open == 0) < 1.0
        assert wait_for(lambda: json.loads(send(url, "/health")[2])["running"] == 0) < 1.0


def test_a_client_that_hangs_up_before_its_first_token_frees_its_place():
    engine = Scripted(words=1, pause=30.0, slots=1)
    with running(engine) as url:
        client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        body = json.dumps(ASK).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: engine.open == 1)
        client.close()
        assert wait_for(lambda: engine.open == 0) < 1.0
        metrics = send(url, "/metrics")[2].decode()
        assert "finegraft_disconnects_total 1" in metrics


def test_who_waits_is_answered_in_turn_and_the_rest_is_told_when_to_come_back():
    engine = Scripted(words=2, pause=0.1, slots=1)
    with running(engine, limits=Limits(waiting=2)) as url:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: send(url, CHAT, ASK), range(8)))
        full = [answer for answer in answers if answer[0] == 429]
        assert len(full) >= 3 and all(a[0] == 200 for a in answers if a not in full)
        assert all(1 <= int(answer[1]["retry-after"]) <= 60 for answer in full)
        assert code(full[0]) == (429, "FG-SERVE-010")
        assert send(url, CHAT, ASK)[0] == 200  # places were given back


def test_an_answer_that_takes_too_long_ends():
    with running(Scripted(words=50, pause=0.1), limits=Limits(seconds=0.3)) as url:
        began = time.monotonic()
        assert code(send(url, CHAT, ASK)) == (408, "FG-SERVE-017")
        _, _, body = send(url, CHAT, {**ASK, "stream": True})
        last = [line for line in body.decode().split("\n\n") if line][-1]
        assert json.loads(last[6:])["error"]["code"] == "FG-SERVE-017"
        assert time.monotonic() - began < 3


def test_a_body_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.2)
    with running(Scripted()) as url:
        client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + b"Content-Length: 10\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_body_over_the_limit_is_refused_declared_or_not():
    with running(Scripted(), limits=Limits(most_bytes=2000)) as url:
        large = json.dumps({**ASK, "user": "x" * 3000}).encode()
        assert code(send(url, CHAT, large)) == (413, "FG-SERVE-013")
        client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        chunk = b"%x\r\n%s\r\n" % (len(large), large)
        client.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_key_is_needed_where_there_is_one(caplog):
    with running(Scripted(), key=KEY) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                answer = send(url, path, headers=headers)
                assert code(answer) == (401, "FG-SERVE-012")
                assert answer[1]["www-authenticate"] == "Bearer"
        good = {"Authorization": f"Bearer {KEY}"}
        assert send(url, "/v1/models", headers=good)[0] == 200
        assert send(url, CHAT, ASK, headers={**good, "Host": "example.org"})[0] == 200
        assert send(url, "/health")[0] == 200 and send(url, "/")[0] == 200
    assert KEY not in caplog.text


def test_without_a_key_only_this_machine_is_a_host(quick):
    for host in ("example.org", "127.0.0.1.example.org", "example.org:8000", ""):
        assert code(send(quick, "/v1/models", headers={"Host": host})) == (421, "FG-SERVE-011")
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
        assert send(quick, "/v1/models", headers={"Host": host})[0] == 200


def test_foreign_pages_get_nothing(quick):
    foreign = {"Origin": "https://example.org"}
    for answer in (
        send(quick, CHAT, ASK, headers=foreign),
        send(quick, CHAT, b"", method="OPTIONS", headers=foreign),
        send(quick, "/v1/models", headers=foreign),
    ):
        assert not [name for name in answer[1] if name.startswith("access-control")]
    form = {"Content-Type": "text/plain"}  # what a page may send without asking
    assert code(send(quick, CHAT, json.dumps(ASK).encode(), headers=form)) == (
        415,
        "FG-SERVE-014",
    )


def test_health_metrics_models_and_document(quick):
    send(quick, CHAT, ASK)
    assert json.loads(send(quick, "/health")[2])["status"] == "ok"
    status, headers, body = send(quick, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    text = body.decode()
    assert 'finegraft_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    assert "finegraft_answer_seconds_count" in text
    models = json.loads(send(quick, "/v1/models")[2])["data"]
    assert [(m["id"], m["parent"]) for m in models] == [("scripted", None), ("tuned", "scripted")]
    assert json.loads(send(quick, "/v1/models/tuned")[2])["parent"] == "scripted"
    document = json.loads(send(quick, "/openapi.json")[2])
    assert {"/v1/chat/completions", "/v1/embeddings", "/health"} <= set(document["paths"])
    assert "messages" in document["components"]["schemas"]["Chat"]["properties"]


def test_embeddings_as_numbers_and_as_base64(quick):
    answer = json.loads(send(quick, "/v1/embeddings", {"input": ["a", "b"]})[2])
    assert [row["embedding"] for row in answer["data"]] == [[1.0, 0.0], [1.0, 0.0]]
    coded = json.loads(
        send(quick, "/v1/embeddings", {"input": "a", "encoding_format": "base64"})[2]
    )
    assert coded["data"][0]["embedding"] == "AACAPwAAAAA="
    other = send(quick, "/v1/embeddings", {"input": "a", "dimensions": 7})
    assert code(other) == (400, "FG-SERVE-015")


def test_the_page_uses_nothing_from_elsewhere(quick):
    status, headers, body = send(quick, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in headers["content-security-policy"]
    page = body.decode()
    assert "http://" not in page and "https://" not in page and "src=" not in page
    assert "innerHTML" not in page and "prefers" not in page.replace("color-scheme", "")


def test_what_is_not_there_is_said_in_the_same_shape(quick):
    assert code(send(quick, "/nothing")) == (404, "FG-SERVE-015")
    assert code(send(quick, CHAT, method="GET")) == (405, "FG-SERVE-015")
    assert code(send(quick, CHAT, {**ASK, "model": "gpt-4"})) == (404, "FG-SERVE-016")
    for path in ("/../../etc/passwd", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", "/page.html"):
        assert send(quick, path)[0] == 404


def test_mistakes_are_named(quick):
    cases = {
        "temprature": ({"temprature": 1}, "did you mean 'temperature'"),
        "negative": ({"max_tokens": -1}, "max_tokens: "),
        "type": ({"temperature": "hot"}, "temperature: "),
        "image": (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        "n": ({"n": 2}, "n: "),
        "shares": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        "format": ({"response_format": {"type": "yaml"}}, "response_format.type"),
        "schema": ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        "bias": ({"logit_bias": {"x": 1}}, "logit_bias takes token ids"),
        "stop": ({"stop": [""]}, "stop"),
        "empty": ({"messages": []}, "messages"),
    }
    for name, (change, words) in cases.items():
        answer = send(quick, CHAT, {**ASK, **change})
        assert code(answer) == (400, "FG-SERVE-015"), name
        assert words in json.loads(answer[2])["error"]["message"], name


def test_a_schema_is_refused_by_an_engine_that_cannot_keep_to_it(quick):
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    answer = send(quick, CHAT, {**ASK, "response_format": wanted})
    assert code(answer) == (400, "FG-SERVE-019")


def test_an_endpoint_that_the_engine_lacks_is_named():
    engine = Scripted()
    engine.features = frozenset({"chat"})
    with running(engine) as url:
        answer = send(url, "/v1/embeddings", {"input": "a"})
        assert code(answer) == (400, "FG-SERVE-018")
        assert CHAT in json.loads(answer[2])["error"]["message"]


def test_addresses_and_keys_are_checked_before_anything_is_loaded():
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        run.check(host, None)
    run.check("0.0.0.0", KEY)
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""):
        with pytest.raises(ConfigError, match="FG-SERVE-001"):
            run.check(host, None)
    for key in ("short", "with\nnewline-in-it", "schlüssel-schlüssel"):
        with pytest.raises(ConfigError, match="FG-SERVE-001"):
            run.check("127.0.0.1", key)


def test_a_taken_port_is_an_error_with_a_cure():
    with run.bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="FG-SERVE-004"):
        run.bind("127.0.0.1", taken.getsockname()[1])


def test_a_missing_extra_is_named_with_its_command():
    with pytest.raises(ConfigError, match=r"FG-SERVE-002(.|\n)*finegraft\[serve\]"):
        run.require_extra("fastapi", "no_such_package_here")
