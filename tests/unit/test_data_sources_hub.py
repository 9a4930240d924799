"""Data sets of a hub on 127.0.0.1: splits, subsets, refusals, and the cache."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pytest
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubserver import client_env

SHA = "0123456789abcdef0123456789abcdef01234567"
TWO_SUBSETS = """---
configs:
- config_name: small
  data_files: small/*.parquet
- config_name: large
  data_files: large/*.parquet
---
"""
CLIENT = """
import json, sys
from finegraft.core.errors import FinegraftError
from finegraft.data import sources
out = []
for spec in sys.argv[1:]:
    try:
        out.append([sources.read_rows(spec), sources.fingerprint(spec)])
    except FinegraftError as error:
        out.append(error.as_dict())
print(json.dumps(out))
"""


class _Handler(BaseHTTPRequestHandler):
    """The four calls of ``datasets``: information, revision, tree of one folder, file."""

    root: Path
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        self.asked.append(f"{self.command} {url.path}")
        if parts[:2] == ["api", "datasets"]:
            self._api(parts[2:], parse_qs(url.query))
        elif parts[:1] == ["datasets"] and len(parts) > 5:
            self._file(self.root.joinpath(*parts[1:3]), "/".join(parts[5:]))
        else:
            self._refuse("RepoNotFound")

    def _api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        folder = self.root.joinpath(*parts[:2])
        if not folder.is_dir():
            return self._refuse("RepoNotFound")
        name, rest = "/".join(parts[:2]), parts[2:]
        if rest[:1] != ["tree"]:
            return self._send({"id": name, "sha": SHA, "private": False, "siblings": []})
        inside = folder.joinpath(*rest[2:])
        if not inside.is_dir():
            return self._refuse("EntryNotFound")
        found = sorted(
            inside.rglob("*") if query.get("recursive") == ["true"] else inside.iterdir()
        )
        self._send(
            [
                {
                    "type": "directory" if p.is_dir() else "file",
                    "path": p.relative_to(folder).as_posix(),
                    "oid": "0" * 40,
                    "size": p.stat().st_size,
                }
                for p in found
            ]
        )

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._refuse("EntryNotFound")
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": SHA}
        self._bytes(200, path.read_bytes(), headers)

    def _refuse(self, code: str) -> None:
        self._bytes(404, b"{}", {"X-Error-Code": code})

    def _send(self, value: object) -> None:
        self._bytes(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _write(path: Path, count: int, word: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{word} {i}", "completion": str(i)} for i in range(count)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What one client process makes of every name; a second one without a hub follows."""
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    _write(root / "me/rows/data/train-00000-of-00002.parquet", 3, "first")
    _write(root / "me/rows/data/train-00001-of-00002.parquet", 2, "second")
    _write(root / "me/rows/data/test-00000-of-00001.parquet", 1, "test")
    _write(root / "me/two/small/train.parquet", 1, "small")
    _write(root / "me/two/large/train.parquet", 4, "large")
    (root / "me/two/README.md").write_text(TWO_SUBSETS)
    _write(root / "me/odd/data/dev-00000-of-00001.parquet", 1, "dev")
    _write(root / "me/odd/data/exam-00000-of-00001.parquet", 1, "exam")
    names = [
        *("me/rows", "hf:me/rows:test", "me/rows:nope", "me/none", "hf:me/two", "hf:me/two/large"),
        *("me/odd", "hf:me/odd:exam", "hf:nonsense"),
    ]
    handler = type("Handler", (_Handler,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        found = dict(zip(names, _client(url, home, names), strict=True))
    finally:
        server.shutdown()
        server.server_close()
    found["asked"] = handler.asked  # type: ignore[attr-defined]
    found["later"] = _client(url, home, ["me/rows", "me/other"], HF_HUB_OFFLINE="1")
    return found


def _client(url: str, home: Path, names: list[str], **extra: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *names],
        env=client_env(url, home, **extra),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_train_is_read_where_no_split_is_named(answers: dict[str, object]) -> None:
    rows, digest = answers["me/rows"]  # type: ignore[misc]
    assert [row["prompt"] for row in rows] == [
        *("first 0", "first 1", "first 2", "second 0", "second 1"),
    ]
    assert len(digest) == 64
    assert all(path.split()[0] in ("GET", "HEAD") for path in answers["asked"])  # type: ignore[attr-defined]


def test_a_split_and_a_subset_by_name(answers: dict[str, object]) -> None:
    assert [row["prompt"] for row in answers["hf:me/rows:test"][0]] == ["test 0"]  # type: ignore[index]
    assert len(answers["hf:me/two/large"][0]) == 4  # type: ignore[index]
    assert [row["prompt"] for row in answers["hf:me/odd:exam"][0]] == ["exam 0"]  # type: ignore[index]
    assert answers["hf:me/rows:test"][1] != answers["me/rows"][1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("me/rows:nope", "FG-DATA-032", "nope"),
        ("hf:me/two", "FG-DATA-032", "large"),
        ("me/odd", "FG-DATA-032", "dev, exam"),
        ("me/none", "FG-DATA-031", "me/none"),
        ("hf:nonsense", "FG-DATA-031", "no name of a data set"),
    ],
)
def test_what_cannot_be_had_says_why(
    answers: dict[str, object], name: str, code: str, said: str
) -> None:
    error = answers[name]
    assert isinstance(error, dict) and error["code"] == code
    assert said in error["found"] and error["fix"]


def test_the_cache_answers_without_a_hub(answers: dict[str, object]) -> None:
    rows, other = answers["later"]  # type: ignore[misc]
    assert rows == answers["me/rows"]
    assert other["code"] == "FG-DATA-031"
