"""Nothing of the page's server is reached by who was not invited: each way in, tried."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time

import pytest
from ui_tiny import Asker, events, served, write_run

from finegraft.ui.app import _ROUTES

LIMIT = 200_000  # bytes of an upload here
ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A signed-in browser at a server over a workspace with one run."""
    root = tmp_path_factory.mktemp("page")
    folder = root / "work"
    write_run(folder / "runs" / "a", 3)
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_bytes(ROW)
    (root / "secret.jsonl").write_bytes(b'{"prompt": "secret", "completion": "x"}\n')
    (folder / "data" / "link.jsonl").symlink_to(root / "secret.jsonl")
    (folder / "runs" / "linked").symlink_to(write_run(root / "elsewhere", 2).parent)
    before = os.getcwd()
    os.chdir(folder)
    try:
        with served(folder, most_upload=LIMIT) as (asker, desk):
            asker.sign_in(desk.sessions.token())
            asker.desk, asker.folder = desk, folder
            yield asker
    finally:
        os.chdir(before)


def every_address():
    for part in _ROUTES:
        for route in part.router.routes:
            path = route.path.replace("{name:path}", "a").replace("{name}", "a")
            for method in route.methods:
                yield method, path


ADDRESSES = sorted(set(every_address()) - {("POST", "/api/session")})


def code(answer):
    return answer.status, answer.json["error"]["code"]


def test_there_are_addresses_to_try():
    assert len(ADDRESSES) > 30
    assert ("GET", "/api/runs/a/stream") in ADDRESSES
    assert ("POST", "/api/try/a/chat") in ADDRESSES


@pytest.mark.parametrize(("method", "path"), [*ADDRESSES, ("GET", "/nothing"), ("GET", "/docs")])
def test_without_the_cookie_there_is_nothing(page, method, path):
    for cookie in ("", "finegraft_ui_1=x", f"finegraft_ui_{page.port}=wrong", page.cookie + "x"):
        stranger = Asker(page.port)
        answer = stranger(method, path, **({"Cookie": cookie} if cookie else {}))
        assert code(answer) == (401, "FG-UI-001")
        assert answer.json["error"]["fix"]


def test_only_the_page_itself_is_open(page):
    stranger = Asker(page.port)
    assert stranger("GET", "/").status == 200
    assert stranger("GET", "/favicon.ico").status == 204
    for path in ("/static/../api/state", "/static/%2e%2e/api/state", "/static//../../pyproject"):
        assert stranger("GET", path).status == 404
    assert stranger("POST", "/static/x").status == 401


def test_a_token_opens_one_session(page):
    token = page.desk.sessions.token()
    browser = Asker(page.port)
    answer = browser("POST", "/api/session", {"token": token})
    assert answer.status == 204
    attributes = answer.getheader("Set-Cookie").lower()
    assert f"finegraft_ui_{page.port}=" in attributes
    for word in ("httponly", "samesite=strict", "path=/"):
        assert word in attributes
    for wrong in (token, "", "x" * 43, page.cookie.partition("=")[2]):
        answer = browser("POST", "/api/session", {"token": wrong})
        assert code(answer) in ((401, "FG-UI-004"), (400, "FG-UI-009"))
        assert answer.getheader("Set-Cookie") is None
    address = page("POST", "/api/session/new").json["address"]
    assert Asker(page.port).sign_in(address.partition("#token=")[2])("GET", "/api/state").status


def test_cookies_of_other_programs_do_not_hide_ours(page):
    cookies = f'a={{"x": [1,2]}}; b; =; {page.cookie}; c="'
    assert page("GET", "/api/runs", Cookie=cookies).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "", "[::1]"])
def test_a_name_that_is_not_ours_is_refused(page, host):
    for path in ("/", "/api/runs"):
        answer = page("GET", path, Host=host.format(port=page.port))
        assert code(answer) == (421, "FG-UI-002")


def test_two_hosts_are_refused(page):
    with socket.create_connection(("127.0.0.1", page.port)) as plain:
        own = f"127.0.0.1:{page.port}"
        lines = f"GET /api/runs HTTP/1.1\r\nHost: {own}\r\nHost: {own}\r\nCookie: {page.cookie}"
        plain.sendall(f"{lines}\r\n\r\n".encode())
        assert plain.recv(100).split()[1] in (b"400", b"421")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}"},  # asked by its other name
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},  # another port of this machine
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
    ],
)
def test_other_pages_reach_nothing(page, headers):
    headers = {name: value.format(port=page.port) for name, value in headers.items()}
    for method, path in (("GET", "/api/runs"), ("POST", "/api/jobs"), ("POST", "/api/session")):
        assert code(page(method, path, body={}, **headers)) == (403, "FG-UI-003")
    stream = page("GET", "/api/runs/a/stream", **headers)
    assert code(stream) == (403, "FG-UI-003")


def test_our_own_page_and_a_link_to_it_are_let_in(page):
    own = f"http://127.0.0.1:{page.port}"
    assert page("GET", "/api/runs", Origin=own, Sec_Fetch_Site="same-origin").status == 200
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert Asker(page.port)("GET", "/", **link).status == 200


NASTY = [
    "../secret.jsonl",
    "data/../../secret.jsonl",
    "data/link.jsonl",
    "/etc/passwd",
    "data/rows.jsonl\0.csv",
    "..",
    ".",
    "",
    ".finegraft-ui/jobs",
    "\ud800",
    "x" * 5000,
]


@pytest.mark.parametrize("path", NASTY)
def test_rows_elsewhere_are_refused(page, path):
    for kind in ("check", "fix", "eval"):
        answer = page("POST", "/api/jobs", {"kind": kind, "data": path or "..", "run": "a"})
        assert code(answer) in ((403, "FG-UI-005"), (400, "FG-UI-009"))
    assert page.desk.jobs.all() == []


SCHEMES = [
    "file:///etc/passwd",
    "local://etc/passwd",
    "simplecache::file:///etc/passwd",
    "FILE://x",
]
SPECS = [*NASTY[:-3], *SCHEMES, "x" * 5000, "-", "data/*.jsonl", ["../x.jsonl"], [{"path": "/x"}]]


@pytest.mark.parametrize("path", SPECS)
@pytest.mark.parametrize("key", ["data", "eval_data"])
def test_a_training_reads_nothing_elsewhere(page, key, path):
    settings = {"model": "demo", "data": "data/rows.jsonl", key: path}
    if path:
        for address in ("/api/forecast", "/api/settings/check"):
            assert code(page("POST", address, {"settings": settings})) == (403, "FG-UI-005")
        answer = page("POST", "/api/jobs", {"kind": "train", "settings": settings})
        assert code(answer) == (403, "FG-UI-005")
    assert page.desk.jobs.all() == []


@pytest.mark.parametrize(
    "path",
    [
        "..%2Fsecret.jsonl",
        "%2e%2e/secret.jsonl",
        "%2E%2E%2Fsecret.jsonl",
        "data%2F..%2F..%2Fsecret.jsonl",
        "data/link.jsonl",
        "%2Fetc%2Fpasswd",
        "data/rows.jsonl%00",
    ],
)
def test_looking_elsewhere_is_refused(page, path):
    assert code(page("GET", f"/api/data/look?path={path}")) == (403, "FG-UI-005")


@pytest.mark.parametrize("pattern", ["data/*.jsonl", "../*.jsonl", "data/../../*.jsonl"])
def test_patterns_do_not_reach_out(page, pattern):
    body = {"settings": {"model": "demo", "data": pattern}}
    assert code(page("POST", "/api/settings/check", body)) == (403, "FG-UI-005")


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2F..", "linked", "a%2F..%2F..%2F..", "%00"])
def test_runs_elsewhere_are_refused(page, name):
    for method, rest in (("GET", ""), ("GET", "/series"), ("DELETE", ""), ("GET", "/stream")):
        answer = page(method, f"/api/runs/{name}{rest}")
        assert answer.status in (403, 404)
    assert page("GET", f"/runs/{name}/report/").status in (403, 404)
    assert (page.folder / "runs" / "linked").exists()


def test_models_and_outputs_elsewhere_are_refused(page):
    home = {"settings": {"model": "~/x", "data": "data/rows.jsonl"}}  # ~ is a name like others
    assert page("POST", "/api/settings/check", home).json["settings"]["model"] == "./~/x"
    for model in ("../elsewhere", "/etc", "../../x.gguf", "data/link.jsonl"):
        body = {"settings": {"model": model, "data": "data/rows.jsonl"}}
        assert code(page("POST", "/api/settings/check", body)) == (403, "FG-UI-005")
        assert code(page("POST", "/api/jobs", {"kind": "fetch", "model": model}))[0] == 403
    template = {"model": "demo", "data": "data/rows.jsonl", "chat_template": "../x.jinja"}
    answer = page("POST", "/api/settings/check", {"settings": template})
    assert code(answer) == (403, "FG-UI-005")
    for output in ("../x", "/tmp/x", "a/../../x", "-x"):
        body = {"settings": {"model": "demo", "data": "data/rows.jsonl", "output": output}}
        assert page("POST", "/api/settings/check", body).status in (400, 403)
    job = {"kind": "export", "run": "a", "formats": ["lora"], "output": "../x"}
    assert code(page("POST", "/api/jobs", job)) == (403, "FG-UI-005")


def test_no_word_becomes_a_flag(page):
    for formats in (["--json"], ["lora", "-x"], "lora,--push", ["a b"], [], None, [1]):
        job = {"kind": "export", "run": "a", "formats": formats}
        assert code(page("POST", "/api/jobs", job)) == (400, "FG-UI-009")
    (page.folder / "-x.jsonl").write_bytes(ROW)
    assert page.desk.space.name_of(page.folder / "-x.jsonl") == "./-x.jsonl"


@pytest.mark.parametrize("name", ["x.py", "x.sh", "x", "x.jsonl.exe", "x.html", "x.parquet.gz"])
def test_what_holds_no_rows_is_not_taken(page, name):
    assert code(page("PUT", f"/api/data/{name}", raw=ROW)) == (415, "FG-UI-007")
    assert not (page.folder / "data" / name).exists()


@pytest.mark.parametrize("name", ["..%2Fx.jsonl", ".hidden.jsonl", "a%2Fb.jsonl", "a%00.jsonl"])
def test_a_file_has_a_plain_name(page, name):
    assert page("PUT", f"/api/data/{name}", raw=ROW).status in (400, 403)


def test_a_link_is_not_written_through(page):
    before = (page.folder.parent / "secret.jsonl").read_bytes()
    assert code(page("PUT", "/api/data/link.jsonl", raw=ROW)) == (403, "FG-UI-005")
    assert (page.folder.parent / "secret.jsonl").read_bytes() == before


def partial_files(page):
    return list((page.folder / "data").glob(".*.partial"))


def test_an_upload_is_limited_by_its_length_and_by_what_comes(page):
    assert page("PUT", "/api/data/big.jsonl", raw=b"x" * LIMIT).status == 201
    for raw in (b"x" * (LIMIT + 1), (b"x" * 10_000 for _ in range(21))):
        with contextlib.suppress(ConnectionError):  # it hung up while the rest was sent
            answer = page("PUT", "/api/data/big.jsonl", raw=raw, Content_Type="x")
            assert code(answer) == (413, "FG-UI-006")
    assert (page.folder / "data" / "big.jsonl").stat().st_size == LIMIT
    assert partial_files(page) == []
    big = json.dumps({"token": "x" * (5 << 20)})
    with contextlib.suppress(ConnectionError):
        assert code(page("POST", "/api/session", raw=big)) == (413, "FG-UI-006")


def test_an_upload_that_breaks_off_leaves_the_old_file(page):
    page("PUT", "/api/data/old.jsonl", raw=ROW)
    connection = http.client.HTTPConnection("127.0.0.1", page.port)
    connection.putrequest("PUT", "/api/data/old.jsonl")
    connection.putheader("Cookie", page.cookie)
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"half")
    end = time.monotonic() + 10
    while not partial_files(page) and time.monotonic() < end:
        time.sleep(0.01)
    assert (page.folder / "data" / "old.jsonl").read_bytes() == ROW
    connection.close()
    while partial_files(page) and time.monotonic() < end:
        time.sleep(0.01)
    assert partial_files(page) == []
    assert (page.folder / "data" / "old.jsonl").read_bytes() == ROW
    page("PUT", "/api/data/old.jsonl", raw=ROW * 2)
    assert (page.folder / "data" / "old.jsonl").read_bytes() == ROW * 2


def test_answers_keep_browsers_strict(page):
    for path in ("/", "/api/runs", "/nothing"):
        answer = page("GET", path)
        policy = answer.getheader("Content-Security-Policy")
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
    assert page("GET", "/api/runs").getheader("Cache-Control") == "no-store"


def test_a_report_runs_nothing(page):
    assert code(page("GET", "/runs/a/report/")) == (404, "FG-UI-010")
    (page.folder / "runs" / "a" / "report").mkdir(exist_ok=True)
    (page.folder / "runs" / "a" / "report" / "index.html").write_text("<p>it</p>")
    answer = page("GET", "/runs/a/report/")
    assert answer.body == b"<p>it</p>"
    policy = answer.getheader("Content-Security-Policy")
    assert "sandbox" in policy and "script-src" not in policy


def test_a_stream_needs_the_cookie(page):
    with page.stream("/api/runs/a/stream") as stream:
        assert next(events(stream))[0] == "state"
    assert page.stream("/api/runs/a/stream", Cookie="finegraft_ui_1=x").status == 401
    chat = Asker(page.port)("POST", "/api/try/a/chat", {"messages": []})
    assert code(chat) == (401, "FG-UI-001")


def test_websockets_are_refused(page):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    assert Asker(page.port)("GET", "/api/runs", **headers).status in (400, 401, 403, 426)


def test_nonsense_gets_the_one_shape_of_errors(page):
    for method, path, body in (
        ("POST", "/api/jobs", {"kind": "nope"}),
        ("POST", "/api/jobs", {}),
        ("POST", "/api/jobs", []),
        ("POST", "/api/forecast", {"settings": 3}),
        ("PUT", "/api/runs/a/notes", {"text": 3}),
        ("GET", "/api/compare", None),
        ("PATCH", "/api/runs", None),
    ):
        answer = page(method, path, body)
        assert 400 <= answer.status < 500
        assert set(answer.json["error"]) >= {"code", "message", "allowed", "fix"}
    answer = page("POST", "/api/jobs", raw=b"{", Content_Type="application/json")
    assert code(answer) == (400, "FG-UI-009")
