"""A model hub on 127.0.0.1: enough of the protocol for downloads and uploads, and its refusals.

What: ``HubServer`` serves local folders as ``owner/name`` and takes uploads into ``root``. How:
http.server in a thread; for downloads the three calls of huggingface_hub (revision, tree, resolve),
for uploads create, preupload, the LFS batch with one or several PUTs, and the commit; the error
headers it tells refusals apart by. A ``Fault`` drops or holds a connection in mid-PUT. Constraint:
the endpoint is read when huggingface_hub is imported, so a test runs its client in a subprocess
with ``HF_ENDPOINT`` set, see ``client_env``. Trade-off: xet, which the real hub prefers, is not
spoken; ``client_env`` turns it off in the client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
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
    writers: tuple[str, ...] = ()
    commits: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()  # as by a .gitignore

    @property
    def sha(self) -> str:
        words = "".join([str(self.folder), *self.commits])
        return hashlib.sha1(words.encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        found = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return {p.relative_to(self.folder).as_posix(): p for p in found}


@dataclass
class Fault:
    """What happens to the PUT number ``put`` (from 0) after ``after`` bytes of its body.

    ``drop`` closes the connection, ``hold`` reads no further until ``released`` is set; ``reached``
    is set when it is so far.
    """

    put: int
    after: int
    kind: str = "drop"
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Put:
    """One upload of a file or a part: how much of it arrived, and whether that was all."""

    path: str
    bytes: int = 0
    whole: bool = False


@dataclass
class HubServer:
    """Use as a context manager. ``requests`` lists what was asked, as ``METHOD path``.

    ``accounts`` has the owner and the role of each token; ``root`` takes what is uploaded, files
    larger than ``part_bytes`` in parts of that size; ``puts`` lists every one. ``cut`` drops the
    connection of the next POST whose path ends so, ``before`` or ``after`` it was carried out.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    root: Path | None = None
    accounts: dict[str, tuple[str, str]] = field(default_factory=dict)
    part_bytes: int = 10**12
    faults: list[Fault] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    created: dict[str, dict[str, object]] = field(default_factory=dict)
    cut: dict[str, str] = field(default_factory=dict)

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
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "xdg"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    mute = False
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self._read()
        path = urlsplit(self.path).path
        end = next((end for end in self.hub.cut if path.endswith(end)), None)
        self.mute = end is not None
        if end is None or self.hub.cut.pop(end) == "after":
            self._upload(body.decode() if body is not None else "")
        if self.mute:
            self.close_connection = True

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        number = len(self.hub.puts)
        self.hub.requests.append(f"PUT {path}")
        self.hub.puts.append(put := Put(path))
        body = self._read(put, next((f for f in self.hub.faults if f.put == number), None))
        if body is None:
            return
        put.whole = True
        self.hub.parts[path] = body
        if path.count("/") == 2:  # one PUT for the whole object
            self.hub.objects[path.rpartition("/")[2]] = body
        self._send(200, b"", {"ETag": hashlib.md5(body).hexdigest()})

    def _read(self, put: Put | None = None, fault: Fault | None = None) -> bytes | None:
        """The body of a request, None where the connection broke."""
        found, length = bytearray(), self.headers.get("Content-Length")
        while True:
            if length is not None:
                left = int(length) - len(found)
                piece = self.rfile.read1(min(left, 65536)) if left else b""
            else:
                size = int(self.rfile.readline().strip() or b"0", 16)
                piece = self.rfile.read(size)
                self.rfile.readline()
            if not piece:
                break
            found += piece
            if put:
                put.bytes = len(found)
            if fault and len(found) >= fault.after:
                fault.reached.set()
                if fault.kind == "hold":
                    fault.released.wait(60)
                self.close_connection = True
                self.connection.close()
                return None
        if length is not None and len(found) < int(length):
            self.close_connection = True
            return None
        return bytes(found)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.mute:
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {k: v for k, v in headers.items() if v})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            return self._whoami()
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

    def _json(self, values: object, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _upload(self, body: str) -> None:
        """What is POSTed: create, validate-yaml, preupload, the LFS batch and its ends, commit."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":  # addresses that were given with the batch carry no token
            return self._end_of_parts(parts[1], json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if token not in self.hub.accounts:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        owner, role = self.hub.accounts[token]
        if path == "/api/repos/create":
            return self._create(json.loads(body), owner, role)
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        name = "/".join(parts[:2]).removesuffix(".git")
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if owner not in repo.writers or role == "read":
            return self._refuse(403, "", "you have no right to write here")
        if len(parts) > 3 and parts[2] != "info" and parts[3] not in repo.revisions:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {parts[3]}")
        if parts[2] == "preupload":
            return self._json({"files": [_mode(repo, f) for f in json.loads(body)["files"]]})
        if parts[2] == "commit":
            return self._commit(name, repo, body)
        self._batch(json.loads(body))

    def _create(self, asked: dict, owner: str, role: str) -> None:
        name = f"{asked.get('organization') or owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        if role == "read" or not name.startswith(f"{owner}/"):
            return self._refuse(403, "", "You don't have the rights to create a model here")
        assert self.hub.root is not None
        (self.hub.root / name).mkdir(parents=True)
        self.hub.created[name] = asked
        access = "private" if asked.get("visibility") == "private" else "open"
        access = "private" if asked.get("private") else access
        token = next(t for t, (who, _) in self.hub.accounts.items() if who == owner)
        self.hub.repos[name] = Repo(self.hub.root / name, access, token, writers=(owner,))
        self._json(answer)

    def _batch(self, asked: dict) -> None:
        answers = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in self.hub.objects:
                answers.append({"oid": oid, "size": size})
                continue
            count = math.ceil(size / self.hub.part_bytes)
            base = f"{self.hub.url}/lfs/{oid}"
            upload: dict[str, object] = {"href": base}
            if count > 1:
                header = {str(n): f"{base}/{n}" for n in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(self.hub.part_bytes), **header}
            verify = {"href": f"{base}/verify"}
            answers.append(
                {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}
            )
        self._json({"transfer": "basic", "objects": answers})

    def _end_of_parts(self, oid: str, asked: dict) -> None:
        if "parts" in asked:
            pieces = [self.hub.parts[f"/lfs/{oid}/{p['partNumber']}"] for p in asked["parts"]]
            self.hub.objects[oid] = b"".join(pieces)
        right = hashlib.sha256(self.hub.objects.get(oid, b"")).hexdigest() == oid
        self._json({} if right else {"error": "not what was announced"}, 200 if right else 422)

    def _commit(self, name: str, repo: Repo, body: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
                continue
            file = repo.folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif value["oid"] not in self.hub.objects:
                return self._refuse(400, "", f"{value['path']} was never uploaded")
            else:
                file.write_bytes(self.hub.objects[value["oid"]])
        url = f"{self.hub.url}/{name}/commit/{repo.sha}"
        self._json({"success": True, "commitOid": repo.sha, "commitUrl": url})

    def _api(self, name: str, repo: Repo, rest: list[str]) -> None:
        files = repo.files()
        if rest[:1] == ["tree"]:
            out: object = [_listed(n, p) for n, p in files.items()]
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

    def _whoami(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.accounts:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        owner, role = self.hub.accounts[token]
        account = {"type": "user", "name": owner, "auth": {"accessToken": {"role": role}}}
        self._json(account)


def _is_large(name: str, size: int) -> bool:
    """Whether the hub keeps a file beside git, as its ``.gitattributes`` say."""
    return size > 0 and (name.endswith((".safetensors", ".gguf", ".bin")) or size > 10_000_000)


def _mode(repo: Repo, asked: dict) -> dict[str, object]:
    """How a file is to be sent, and what is there under its name."""
    file = repo.folder / asked["path"]
    large = _is_large(asked["path"], asked["size"])
    there = (_sha256(file) if large else _etag(file)) if file.is_file() else None
    mode = "lfs" if large else "regular"
    ignored = asked["path"] in repo.ignored
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": there}


def _listed(name: str, path: Path) -> dict[str, object]:
    size = path.stat().st_size
    found: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": _etag(path)}
    if _is_large(name, size):
        found["lfs"] = {"oid": _sha256(path), "size": size, "pointerSize": 130}
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _etag(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
