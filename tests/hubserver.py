"""A model hub on 127.0.0.1: enough of the protocol for ``snapshot_download``, and its refusals.

What: ``HubServer`` serves local folders as ``owner/name``. How: http.server in a thread; the three
calls of huggingface_hub (revision, tree, resolve) and the error headers it tells refusals apart by.
Constraint: the endpoint is read when huggingface_hub is imported, so a test runs its client in a
subprocess with ``HF_ENDPOINT`` set, see ``client_env``.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository. ``access`` is open, gated or private; ``token`` opens the last two."""

    folder: Path
    access: str = "open"
    token: str = "hf_good"
    revisions: tuple[str, ...] = ("main",)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.folder).encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        found = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return {p.relative_to(self.folder).as_posix(): p for p in found}


@dataclass
class HubServer:
    """Use as a context manager. ``requests`` lists what was asked, as ``METHOD path``."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


def client_env(endpoint: str, home: Path, **extra: str) -> dict[str, str]:
    """The environment of a subprocess with its hub at ``endpoint`` and its caches in ``home``."""
    dropped = ("HF_", "HUGGING", "XDG_CACHE_HOME", "TRANSFORMERS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "xdg"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {k: v for k, v in headers.items() if v})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "hf_bad":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.access == "private" and token != repo.token):
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in (*repo.revisions, repo.sha):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self._api(name, repo, rest)
        # a gated repository shows its name and file list to everybody, and its files to few
        if repo.access == "gated" and token != repo.token:
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to {name} is gated")
        self._file(repo, "/".join(rest[2:]))

    def _api(self, name: str, repo: Repo, rest: list[str]) -> None:
        files = repo.files()
        if rest[:1] == ["tree"]:
            out: object = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p)}
                for n, p in files.items()
            ]
        else:
            out = {
                "id": name,
                "modelId": name,
                "sha": repo.sha,
                "private": repo.access == "private",
                "gated": "auto" if repo.access == "gated" else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": n} for n in files],
            }
        self._send(200, json.dumps(out).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: Repo, name: str) -> None:
        path = repo.files().get(name)
        if path is None:
            return self._refuse(404, "EntryNotFound", f"Entry not found: {name}")
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": repo.sha}
        self._send(200, path.read_bytes(), headers)


def _etag(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
