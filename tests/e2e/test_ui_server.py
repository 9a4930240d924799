"""``finegraft ui`` as a process: what it started outlives it, and Ctrl-C ends it at once.

A tiny model is trained by command lines that the server starts; the server is killed while it
trains, and the next one finds the run, stops it and goes on with it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import time

import pytest
from command_line import COMMAND, environment, make_model, write_rows

from finegraft.ui.processes import Process


class Browser:
    """One that has opened the printed address."""

    def __init__(self, address):
        self.port = int(address.split(":")[2].partition("/")[0])
        self.cookie = ""
        answer, _ = self("POST", "/api/session", {"token": address.partition("#token=")[2]})
        assert answer.status == 204
        self.cookie = answer.getheader("Set-Cookie").partition(";")[0]

    def open(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        headers = {"Cookie": self.cookie, "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()

    def __call__(self, method, path, body=None):
        answer = self.open(method, path, body)
        text = answer.read()
        return answer, json.loads(text) if text.startswith(b"{") else None

    def until(self, path, good, seconds=90):
        end = time.monotonic() + seconds
        while True:
            _, values = self("GET", path)
            if good(values):
                return values
            assert time.monotonic() < end, values
            time.sleep(0.1)


@contextlib.contextmanager
def page(folder, *words):
    """Run the command; yields a browser and the process."""
    command = [*COMMAND, "ui", "--workspace", str(folder), "--port", "0", "--no-open", "--json"]
    options = {"cwd": folder.parent, "env": environment(), "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen([*command, *words], **options, **pipes) as process:
        try:
            told = json.loads(process.stdout.readline())
            yield Browser(told["address"]), process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ui") / "work"
    (folder / "data").mkdir(parents=True)
    make_model(folder / "tiny")
    write_rows(folder / "data" / "rows.jsonl", 64)
    return folder


SETTINGS = {
    "model": "tiny",
    "data": "data/rows.jsonl",
    "max_length": 64,
    "max_steps": 100_000,
    "save_steps": 1000,
    "report_rows": 0,
    "output": "runs/a",
}


def test_a_run_outlives_the_server_and_is_found_again(folder):
    with page(folder) as (browser, process):
        answer, job = browser("POST", "/api/jobs", {"kind": "train", "settings": SETTINGS})
        assert answer.status == 201
        assert job["command"] == "finegraft train configs/a.yaml --output runs/a"
        _, listed = browser("GET", "/api/runs")
        assert [(run["name"], run["state"]) for run in listed["runs"]] == [("a", "waiting")]
        browser.until("/api/runs/a", lambda run: run and run.get("step", 0) > 3)
        process.kill()
    with page(folder) as (browser, process):
        _, found = browser("GET", f"/api/jobs/{job['id']}")
        assert found["state"] == "running" and found["exit_status"] is None
        _, run = browser("GET", "/api/runs/a")
        assert run["state"] == "running" and run["can_stop"] and run["job"] == job["id"]
        answer, refused = browser("DELETE", "/api/runs/a")
        assert answer.status == 409 and refused["error"]["code"] == "FG-UI-016"
        stream = browser.open("GET", f"/api/runs/a/stream?from={run['offset']}")
        while not stream.readline().startswith(b"event: events"):
            pass
        assert b'"type":"step"' in stream.readline() + stream.readline()
        assert browser("POST", "/api/runs/a/stop")[0].status == 202
        ended = browser.until(f"/api/jobs/{job['id']}", lambda one: one["state"] != "running")
        assert (ended["state"], ended["exit_status"]) == ("stopped", 130)
        assert ended["result"]["interrupted"] is True
        _, run = browser("GET", "/api/runs/a")
        assert run["state"] == "stopped" and run["can_resume"] and run["has_report"]
        answer, error = browser("POST", "/api/runs/a/stop")
        assert answer.status == 409 and error["error"]["code"] == "FG-UI-017"

        _, again = browser("POST", "/api/jobs", {"kind": "resume", "run": "a"})
        assert again["command"] == "finegraft resume runs/a"
        browser.until("/api/runs/a", lambda now: now["step"] > run["step"] + 3)
        assert browser("POST", f"/api/jobs/{again['id']}/stop")[0].status == 200
        said = browser.open("GET", f"/api/jobs/{again['id']}/stream").read().decode()
        assert "event: output" in said and "event: end" in said
        assert '"state":"stopped"' in said
        answer, error = browser("POST", f"/api/jobs/{again['id']}/stop")
        assert answer.status == 409 and error["error"]["code"] == "FG-UI-013"

        open_one = browser.open("GET", "/api/runs/a/stream")
        assert open_one.readline() == b"event: state\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert time.monotonic() - began < 3
        said = process.stderr.read()
        assert "Traceback" not in said and "go on" in said


def token_texts(answer):
    """Texts of a chat's events, and its last one."""
    kind, texts, last = "", [], None
    for line in answer.read().decode().splitlines():
        key, _, value = line.partition(": ")
        if key == "event":
            kind = value
        elif key == "data":
            last = (kind, json.loads(value))
            texts += [last[1]["text"]] if kind == "token" else []
    return texts, last


def test_a_run_is_tried_and_exported(folder):
    short = {**SETTINGS, "max_steps": 3, "output": "runs/short", "eval_fraction": 0.1}
    with page(folder) as (browser, process):
        _, forecast = browser("POST", "/api/forecast", {"settings": short})
        assert forecast["steps"] == 3 and forecast["peak_memory_bytes"] > 10**8
        assert forecast["command"].startswith("finegraft plan --model tiny")
        began = time.monotonic()
        longer = {**short, "max_steps": 30, "learning_rate": 1e-3}
        _, again = browser("POST", "/api/forecast", {"settings": longer})
        assert again["steps"] == 30 and time.monotonic() - began < 1
        wrong = {**short, "data": "data/none.jsonl"}
        answer, error = browser("POST", "/api/forecast", {"settings": wrong})
        assert answer.status == 404 and error["error"]["key"] == "data"

        _, job = browser("POST", "/api/jobs", {"kind": "train", "settings": short})
        done = browser.until(f"/api/jobs/{job['id']}", lambda one: one["state"] != "running")
        assert done["state"] == "done", done["output"]
        _, run = browser("GET", "/api/runs/short")
        assert run["state"] == "finished" and not run["can_resume"]
        assert run["forecast"]["peak_memory_bytes"] and run["actual"]["peak_memory_bytes"]

        answer, trial = browser("POST", "/api/try", {"run": "short"})
        assert answer.status == 201 and trial["models"] == ["base", "tuned"]
        _, early = browser("POST", f"/api/try/{trial['id']}/chat", {"messages": [{}]})
        assert early["error"]["code"] == "FG-UI-021"
        there = f"/api/try/{trial['id']}"
        ready = browser.until(there, lambda one: one["state"] != "starting")
        assert ready["state"] == "ready", ready
        words = "finegraft serve tiny --name base --adapter tuned=runs/short --port 0"
        assert ready["command"] == words and "KEY" not in json.dumps(ready).upper()
        question = {"messages": [{"role": "user", "content": "1 and 1?"}], "max_tokens": 5}
        for which in ("base", "tuned"):
            texts, last = token_texts(
                browser.open("POST", f"{there}/chat", {**question, "which": which})
            )
            assert last[0] == "end" and last[1]["tokens"] <= 5 and last[1]["reason"]
            assert "".join(texts)
        texts, last = token_texts(browser.open("POST", f"{there}/chat", {**question, "top_p": 7}))
        assert last[0] == "error" and last[1]["error"]["code"] == "FG-SERVE-022"
        answer, error = browser("POST", f"{there}/chat", {**question, "which": "other"})
        assert answer.status == 400 and "tuned" in error["error"]["allowed"]
        child = json.loads(next(folder.glob(".finegraft-ui/try/*/process.json")).read_text())

        ask = {"kind": "export", "run": "short", "formats": ["lora"]}
        _, job = browser("POST", "/api/jobs", ask)
        assert job["command"] == "finegraft export runs/short --to lora --output exports/short"
        done = browser.until(f"/api/jobs/{job['id']}", lambda one: one["state"] != "running")
        assert done["state"] == "done", done
        _, found = browser("GET", "/api/exports?run=short")
        (export,) = found["exports"]
        assert (export["path"], export["run"], export["verified"]) == (
            "exports/short",
            "short",
            True,
        )
        assert (
            export["size_bytes"] > 1000 and "finegraft verify exports/short" in export["commands"]
        )
        formats = {one["name"]: one for one in found["formats"]}
        assert formats["lora"]["problem"] is None and formats["lora"]["size_bytes"] > 1000
        half, full = (formats[f"gguf:{kind}"]["size_bytes"] for kind in ("f16", "f32"))
        assert full == pytest.approx(2 * half, abs=2)

        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not Process(**child).alive  # what was loaded for trying ends with the server


def test_a_second_address_and_a_taken_port(folder):
    with page(folder) as (browser, _):
        _, told = browser("POST", "/api/session/new")
        second = Browser(told["address"])
        assert second("GET", "/api/state")[1]["workspace"] == str(folder)
        assert "tiny" in second("GET", "/api/state")[1]["models"]
        words = [*COMMAND, "ui", "--port", str(browser.port), "--no-open", "--json"]
        done = subprocess.run(
            words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert json.loads(done.stdout)["error"]["code"] == "FG-SERVE-004"


def test_a_workspace_that_cannot_be_written(folder):
    blocked = folder / "file"
    blocked.write_text("")
    words = [*COMMAND, "ui", "--workspace", str(blocked), "--no-open", "--json"]
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "FG-DISK-002"
