"""Wrong and hostile requests by the hundred thousand against ``finegraft serve``.

What: bodies with odd values, bytes that are not JSON, huge and deep ones, wrong headers, methods
and paths, broken HTTP, clients that hang up; each must get an answer below 500 in the API's shape,
soon. How: a seeded generator makes raw bytes, several connections send them to a tiny random model
in a process of its own; every so often a good request must get the same answer as at the start.
Constraint: a status of 500 or more, no answer within ``PATIENCE`` seconds, memory that grows, or a
server that ends badly makes the status 1, with the seed and number that repeat it. Trade-off: the
generator is small and knows this API; schemathesis, in the tests, covers what it does not think of.

    python benchmarks/serve_fuzz.py --requests 100000
    python benchmarks/serve_fuzz.py --requests 100000 --gguf
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _clients import COMMAND, Server

PATIENCE = 30.0  # seconds for an answer
GROWTH = 0.10  # of resident memory, from the second quarter of the way to the last
CHECKED = 200  # requests between two good ones
CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0},
    TEXT: {"prompt": "hello world", "max_tokens": 2, "temperature": 0},
    VECTORS: {"input": "hello"},
}
FIELDS = [
    "messages",
    "prompt",
    "input",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "response_format",
    "stream",
    "stream_options",
    "n",
    "user",
    "suffix",
    "echo",
    "best_of",
    "modalities",
    "metadata",
    "store",
    "dimensions",
    "encoding_format",
    "parallel_tool_calls",
    "nope",
    "__proto__",
]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, 2**64, 10**40, -0.0, 0.5, 1.5, 1e308),
    *(float("nan"), float("inf"), "", "a", "\x00", "\ud800", "\U0001f600", "\ufeff", "{{ 7 * 7 }}"),
    *("{% for i in range(9999999) %}x{% endfor %}", "<|im_end|>", "../../etc/passwd", "base"),
    *("required", "auto", "json_object", "A" * 5000, [], {}, [[]], [None], [1, 2, 3], {"a": 1}),
    *({"type": "json_object"}, {"include_usage": True}, {"1": 100}, {"99999999": 1}, ["\n"] * 17),
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$", "type": "string"}}},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    [{"type": "function", "function": {}}],
    [{"type": "text", "text": "hello"}],
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
]
# By field, values that are allowed: most requests should get as far as the model.
FAIR: dict[str, list[Any]] = {
    "max_tokens": [1, 5, None],
    "temperature": [0, 0.7, 100, None],
    "top_p": [1, 0.1, 1e-9],
    "min_p": [0, 0.5, 1],
    "top_k": [0, 1, 5, 2**31 - 1],
    "seed": [0, -1, 2**63, 2**64 - 1, -(2**63)],
    "stop": ["e", ["a", "b"], "\U0001f600", "x" * 1000],
    "frequency_penalty": [2, -2, 0.5],
    "presence_penalty": [2, -2, 0.5],
    "logit_bias": [{"5": 100}, {"5": -100, "6": 1}, {"999999999": 1}, {}],
    "stream": [True, False, None],
    "stream_options": [{"include_usage": True}, {}],
    "prompt": [[1, 2, 3], [10**9], "", ["hello"], "\x00", "hello " * 60],
    "input": [["a", "b"], [1, 2], "", [""]],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}],
    "response_format": [{"type": "text"}, {"type": "json_object"}],
    "n": [1],
    "user": ["x" * 3000],
}
ROLES = ["system", "user", "assistant", "tool", "developer", "", "x", None, 1]
KINDS = [
    "application/json",
    "text/plain",
    "",
    "application/json; charset=utf-16",
    "x/\xff",
    "a" * 99,
]
PATHS = ["/", "/health", "/metrics", "/v1/models", "/openapi.json", "/docs", "/v1", "/v1/models/x"]
ESCAPES = [
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/page.html",
    "/v1/models/",
]
ESCAPES += [
    "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
    "/%00",
    "/%ff%fe",
    "/" + "a" * 8000,
    "/v1/./models",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "get", "\u00d6"]


class Maker:
    """Requests as raw bytes, the same for a seed and number."""

    def __init__(self, seed: int, number: int):
        self.random = random.Random(seed * 1_000_003 + number)
        self.hang_up: float | None = None  # seconds after sending; None: reads the answer
        self.framed = True  # the next request may use the same connection

    def value(self, depth: int = 0) -> Any:
        """Something that JSON can hold, and now and then something it cannot."""
        dice = self.random.random()
        if depth > 3 or dice < 0.7:
            return self.random.choice(ODD)
        if dice < 0.8:
            return "".join(chr(self.random.randrange(0x2500)) for _ in range(20))
        if dice < 0.9:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        keys = self.random.choices(FIELDS, k=self.random.randrange(4))
        return {key: self.value(depth + 1) for key in keys}

    def messages(self) -> Any:
        """A conversation of any shape."""
        choice = self.random.choice
        return [
            {"role": choice(ROLES), "content": choice(["hello", self.value(), None]), **more}
            for more in self.random.choices(
                [{}, {}, {"name": "x"}, {"tool_calls": []}, {"tool_call_id": "1"}, {"nope": 1}],
                k=self.random.randrange(6),
            )
        ]

    def body(self, path: str) -> dict[str, Any]:
        """A good body with some odd values."""
        body = dict(GOOD[path])
        for _ in range(self.random.randrange(1, 4)):
            name = self.random.choice(FIELDS)
            if path == CHAT and self.random.random() < 0.2:
                body.update(logprobs=True, top_logprobs=self.random.choice([0, 20]))
            elif self.random.random() < 0.5:
                body[name] = self.value()
            else:
                name = self.random.choice(sorted(FAIR))
                own = {"prompt": TEXT, "input": VECTORS}.get(name, path)
                if own == path:
                    body[name] = self.random.choice(FAIR[name])
        if path == CHAT and self.random.random() < 0.4:
            body["messages"] = self.messages()
        if self.random.random() < 0.1:
            body.pop(self.random.choice(sorted(body)))
        return body

    def damaged(self, data: bytes) -> bytes:
        """JSON no longer, mostly."""
        choice = self.random.randrange(8)
        place = self.random.randrange(len(data) + 1)
        if choice == 0:
            return data[:place]
        if choice == 1:
            return data[:place] + self.random.randbytes(self.random.randrange(1, 30)) + data[place:]
        if choice == 2:
            return self.random.randbytes(self.random.randrange(200))
        if choice == 3:
            deep = self.random.randrange(1, 100_000)
            return self.random.choice([b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep])
        if choice == 4:
            return b"\xef\xbb\xbf" + data
        if choice == 5:
            size = self.random.choice([2_000, 20_000, 20_000, 200_000, 3_000_000, 5_000_000])
            return data.replace(b"hello", self.random.choice([b"x", b"\\n", b" ", b"a b"]) * size)
        if choice == 6:
            return data[:-1] + b"," + data[1:]  # every key twice
        return data.decode().encode(self.random.choice(["utf-16", "utf-32", "utf-7"]))

    def request(self) -> bytes:
        """Method, path, headers and body."""
        choice, dice = self.random.choice, self.random.random()
        path, method, kind = choice([CHAT, CHAT, TEXT, VECTORS]), "POST", KINDS[0]
        data = json.dumps(self.body(path)).encode("utf-8", "surrogatepass")
        extra = ""
        if dice < 0.55:
            pass
        elif dice < 0.75:
            data = self.damaged(data)
        elif dice < 0.80:
            kind = choice(KINDS)
        elif dice < 0.90:
            path, method = choice([choice(PATHS), choice(ESCAPES), path]), choice(METHODS)
        elif dice < 0.95:
            extra, self.framed = self.header(), False
        elif dice < 0.98:
            data = json.dumps({**GOOD[path], "stream": True, "max_tokens": 30}).encode()
            self.hang_up = self.random.random() * 0.02
        else:
            self.framed = False
            return self.random.randbytes(self.random.randrange(300)) + b"\r\n\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{extra}"
        if "ength" not in extra and "chunked" not in extra:
            head += f"Content-Length: {len(data)}\r\n"
        return f"{head}Content-Type: {kind}\r\n\r\n".encode("latin-1") + data

    def header(self) -> str:
        """One header line that is wrong, or strange and allowed."""
        return self.random.choice(
            [
                "Content-Length: -1\r\n",
                "Content-Length: 99999999999999999999\r\n",
                "Content-Length: 5\r\nContent-Length: 6\r\n",
                "Content-length: zero\r\n",
                "Transfer-Encoding: chunked\r\n",
                "Transfer-Encoding: gzip\r\nContent-Length: 3\r\n",
                "Host: example.org\r\n",
                "X-Long: " + "a" * 20_000 + "\r\n",
                "X-Many: 1\r\n" * 200,
                "Bad Header: 1\r\n",
                "Expect: 100-continue\r\n",
                "Upgrade: websocket\r\nConnection: Upgrade\r\n",
                "Authorization: Bearer \xff\xfe\r\n",
                "Origin: https://example.org\r\n",
            ]
        )


@dataclass
class Findings:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


def shape_of(status: int, kind: str, body: bytes) -> str | None:
    """What is wrong with an answer, or None."""
    if status >= 500:
        return f"status {status}: {body[:200]!r}"
    if status >= 400 and kind.startswith("application/json"):
        error = json.loads(body).get("error")
        if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
            return f"an error of another shape: {body[:200]!r}"
        return None
    if status >= 400 and body not in (b"", b"Invalid HTTP request received."):
        return f"an error that is not JSON: {body[:200]!r}"
    return None


class Caller:
    """One connection, opened again where the server closed it."""

    def __init__(self, url: str):
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)
        self.socket: socket.socket | None = None

    def close(self) -> None:
        """Hang up."""
        if self.socket is not None:
            self.socket.close()
        self.socket = None

    def send(self, data: bytes, framed: bool, hang_up: float | None) -> tuple[str, str | None]:
        """Send raw bytes; return what came of it and what is wrong with that."""
        if self.socket is None:
            self.socket = socket.create_connection((self.host, self.port), timeout=PATIENCE)
        method = data.partition(b" ")[0].decode("latin-1")
        try:
            self.socket.sendall(data)
            if hang_up is not None:
                time.sleep(hang_up)
                self.close()
                return "hung up", None
            if not framed:
                self.socket.shutdown(socket.SHUT_WR)  # else it may wait for a body for 30 s
            answer = http.client.HTTPResponse(self.socket, method=method)
            answer.begin()
            body = answer.read()
        except TimeoutError:
            self.close()
            return "no answer", f"no answer within {PATIENCE:g} s"
        except (ConnectionError, http.client.HTTPException) as error:
            self.close()
            return f"closed ({type(error).__name__})", None
        if answer.will_close or not framed:
            self.close()
        kind = answer.getheader("content-type", "")
        wrong = None if method == "HEAD" else shape_of(answer.status, kind, body)
        return str(answer.status), wrong


def good(url: str, path: str) -> tuple[int, str]:
    """Status and text of a good request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(GOOD[path]), headers)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    choice = (body.get("choices") or [{}])[0]
    return answer.status, str(choice.get("text") or choice.get("message", {}).get("content"))


def fuzz(
    url: str,
    requests: int,
    seed: int = 0,
    callers: int = 4,
    first: int = 0,
    on_checked: Callable[[int], None] = lambda done: None,
) -> Findings:
    """Send the requests ``first`` to ``first + requests`` of a seed; see the module."""
    found, numbers, expected = Findings(), iter(range(first, first + requests)), good(url, CHAT)

    def call() -> None:
        caller = Caller(url)
        while True:
            with found.lock:
                number = next(numbers, None)
            if number is None:
                caller.close()
                return
            maker = Maker(seed, number)
            data, began = maker.request(), time.monotonic()
            try:
                outcome, wrong = caller.send(data, maker.framed, maker.hang_up)
                if number % CHECKED == 0:
                    again = good(url, CHAT)
                    wrong = wrong or (f"a good request got {again}" if again != expected else None)
                    on_checked(number - first)
            except (OSError, ValueError, http.client.HTTPException) as error:
                outcome, wrong = "lost", f"{type(error).__name__}: {error}"
            with found.lock:
                found.statuses[outcome] += 1
                found.slowest = max(found.slowest, time.monotonic() - began)
                if wrong:
                    found.problems.append(f"seed {seed} number {number}: {wrong} {data[:300]!r}")

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def tiny(folder: Path, as_gguf: bool) -> Path:
    """A random model of two layers, as the tests have it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
    from serving_tiny import save_model

    base = save_model(folder / "tiny")
    if not as_gguf:
        return base
    from finegraft.export import gguf

    gguf.write(base, folder / "tiny.gguf", "f32")
    return folder / "tiny.gguf"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--model", help="instead of a tiny random one")
    parser.add_argument("--gguf", action="store_true", help="the tiny model as a GGUF file")
    args = parser.parse_args()
    memory: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or tiny(Path(folder), args.gguf)
        command = [*COMMAND, str(model), "--port", "0", "--json", "--context", "64"]
        server = Server([*command, "--threads", "1"], Path(folder) / "log", OMP_NUM_THREADS="1")
        began = time.monotonic()

        def checked(done: int) -> None:
            memory.append((done, server.memory))
            if done % 5000 == 0:
                rate = done / (time.monotonic() - began)
                print(f"{done} requests, {rate:.0f}/s, {server.memory >> 20} MiB", file=sys.stderr)

        try:
            found = fuzz(server.url, args.requests, args.seed, 4, args.first, checked)
            freed = server.freed()
        finally:
            status = server.stop()
        log = (Path(folder) / "log").read_text()
    if status:
        found.problems.append(f"the server ended with status {status}")
    if "Traceback" in log:
        found.problems.append(f"a traceback in the server's log: {log[-2000:]}")
    if freed > 1:
        found.problems.append(f"places were still taken {freed:.1f} s later")
    quarters = [
        statistics.median([m for done, m in memory if part <= 4 * done / args.requests < part + 1])
        for part in range(4)
    ]
    grown = quarters[3] / quarters[1] - 1
    if grown > GROWTH:
        found.problems.append(f"memory grew by {grown:.0%}")
    seconds = time.monotonic() - began
    result = {
        "requests": sum(found.statuses.values()),
        "seconds": round(seconds),
        "statuses": dict(found.statuses.most_common()),
        "slowest_seconds": round(found.slowest, 2),
        "memory_mib_by_quarter": [round(used / 2**20) for used in quarters],
        "problems": found.problems[:20],
    }
    print(json.dumps(result, indent=2))
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
