"""Jobs, forms and deleting: command lines that are started, what they say, what is undone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from ui_tiny import served, write_run

from finegraft.core.errors import ConfigError
from finegraft.ui import commands, forms
from finegraft.ui.jobs import words_of
from finegraft.ui.processes import Process
from finegraft.ui.workspace import Workspace


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A signed-in browser at a server over a workspace with rows and a run."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with served(tmp_path) as (asker, desk):
        asker.sign_in(desk.sessions.token())
        asker.desk, asker.folder = desk, tmp_path
        yield asker


def ended(page, name, seconds=60):
    end = time.monotonic() + seconds
    while (job := page("GET", f"/api/jobs/{name}").json)["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    return job


def test_a_job_is_the_command_line_that_is_shown(page):
    began = page("POST", "/api/jobs", {"kind": "report", "run": "a"})
    assert began.status == 201
    assert began.json["command"] == "finegraft report runs/a"
    assert began.json["run"] == "runs/a"
    job = ended(page, began.json["id"])
    assert (job["state"], job["exit_status"], job["error"]) == ("done", 0, None)
    assert job["result"] == {"run": "runs/a", "report": "runs/a/report/index.html"}
    assert 0.1 < job["seconds"] < 60
    assert b"<h1" in page("GET", "/runs/a/report/").body
    typed = [sys.executable, "-m", "finegraft.cli.main", *shlex.split(job["command"])[1:], "--json"]
    done = subprocess.run(typed, cwd=page.folder, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == job["result"]
    assert [one["id"] for one in page("GET", "/api/jobs?kind=report").json["jobs"]] == [job["id"]]
    assert page("GET", "/api/jobs?kind=train").json["jobs"] == []


def test_a_job_that_fails_says_why(page):
    (page.folder / "runs" / "empty").mkdir()
    (page.folder / "runs" / "empty" / "config.yaml").write_text("model: demo\n")
    job = page("POST", "/api/jobs", {"kind": "report", "run": "empty"}).json
    job = ended(page, job["id"])
    assert (job["state"], job["exit_status"]) == ("failed", 2)
    assert job["error"]["code"] == "FG-RUN-020"
    assert job["error"]["message"] and job["error"]["fix"]


def test_a_job_whose_process_is_gone_has_failed(page):
    job = page("POST", "/api/jobs", {"kind": "report", "run": "a"}).json
    found = page.desk.jobs.get(job["id"])
    assert found.process.signal(signal.SIGKILL, group=True)
    job = ended(page, job["id"])
    assert job["state"] == "failed" and job["exit_status"] is None
    assert job["error"]["message"]


def test_an_unknown_job(page):
    for name in ("x", "..", "20260101-000000-00000000"):
        answer = page("GET", f"/api/jobs/{name}")
        assert answer.status == 404
    assert answer.json["error"]["code"] == "FG-UI-011"


def test_a_check_finds_what_is_wrong_and_has_a_page(page):
    job = page("POST", "/api/jobs", {"kind": "check", "data": "data/rows.jsonl"}).json
    words = "finegraft data check data/rows.jsonl --report reports/rows.check.html"
    assert job["command"] == words
    job = ended(page, job["id"])
    assert job["state"] == "done"
    assert job["result"]["verdict"] in ("look at these", "do not train"), job["result"]
    assert job["result"]["findings"]
    answer = page("GET", job["page"])
    assert b"<h1" in answer.body
    assert "sandbox" in answer.getheader("Content-Security-Policy")


def test_a_fix_is_written_beside(page):
    asked = {"kind": "fix", "data": "data/rows.jsonl", "map": {"prompt": "prompt"}}
    command = commands.of("fix", asked, page.desk.space)
    assert command.words[-2:] == ("--fix", "data/rows.fixed.jsonl")
    assert "--map prompt=prompt" in command.shown
    (page.folder / "data" / "rows.fixed.jsonl").write_text("")
    again = commands.of("fix", asked, page.desk.space)
    assert again.words[-1] == "data/rows.fixed-2.jsonl"


def test_a_number_that_belongs_to_another_program_is_never_signalled():
    own = Process(os.getpid(), 1.0)
    assert not own.alive
    assert own.signal(signal.SIGKILL) is False
    assert Process.of(os.getpid()).alive
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        gone = Process.of(child.pid)
        child.wait()
    assert not gone.alive and gone.signal() is False


def test_output_has_nothing_that_steers_a_terminal():
    said = b"\x1b[1;31mred\x1b[0m\r\n\x1b]0;title\x07one\rtwo \xff"
    assert words_of(said) == "red\r\none" + "two \ufffd"


SETTINGS = {"model": "demo", "data": "data/rows.jsonl"}


def read(page, **settings):
    return forms.read({**SETTINGS, **settings}, page.desk.space)


def test_a_form_becomes_a_short_file_and_a_command(page):
    given = {"max_steps": 20, "learning_rate": 2e-4, "packing": True, "map": {"prompt": "q"}}
    form = read(page, **given, output="runs/b", lora_alpha="", eval_data=None)
    assert yaml.safe_load(form.yaml) == {
        "model": "demo",
        "data": "data/rows.jsonl",
        "map": {"prompt": "q"},
        "packing": True,
        "max_steps": 20,
    }
    assert form.name == "b" and form.config.output == "runs/b"
    words = shlex.split(form.command("train"))
    assert words[:2] == ["finegraft", "train"] and words[-2:] == ["--output", "runs/b"]
    assert 'map={"prompt": "q"}' in words and "--packing" in words
    assert "--output" not in form.command("plan")


def test_the_shown_flags_mean_what_the_form_means(page):
    from typer.testing import CliRunner

    from finegraft.cli import train
    from finegraft.cli.main import app

    given = {
        "map": {"prompt": "a b"},
        "target_modules": ["q_proj", "v_proj"],
        "data": ["data/rows.jsonl", "data/*.jsonl"],
        "share_prefix": False,
        "method_settings": {"x": 1},
    }
    form = read(page, **given)
    caught = []
    before, train.run_training = train.run_training, lambda out, config, **_: caught.append(config)
    try:
        CliRunner().invoke(app, shlex.split(form.command("train"))[1:])
    finally:
        train.run_training = before
    assert caught[0].model_dump() == form.config.model_dump()


def test_settings_that_do_not_hold_name_their_fields(page):
    wrong = {"learning_rate": -1, "max_step": 3, "optim": [1]}
    answer = page("POST", "/api/settings/check", {"settings": {**SETTINGS, **wrong}})
    assert answer.status == 422
    problems = answer.json["error"]["problems"]
    assert {one["key"] for one in problems} == set(wrong)
    assert answer.json["error"]["key"] is None
    answer = page("POST", "/api/settings/check", {"settings": {"model": "demo"}})
    assert answer.json["error"]["key"] == "data"
    answer = page("POST", "/api/settings/check", {"settings": {**SETTINGS, "r": 0}})
    assert answer.json["error"]["key"] == "r"


def test_the_form_describes_every_setting(page):
    from finegraft.core.schema import TrainConfig

    found = page("GET", "/api/schema").json
    keys = [key for group in found["groups"] for key in group["keys"]]
    assert set(keys) == set(TrainConfig.model_fields) == set(found["schema"]["properties"])
    assert set(found["basic"]) <= set(keys)


def test_a_run_is_not_trained_over(page):
    answer = page("POST", "/api/jobs", {"kind": "train", "settings": {**SETTINGS, "output": "a"}})
    assert (answer.status, answer.json["error"]["code"]) == (409, "FG-UI-014")
    command = commands.of("train", {"settings": SETTINGS}, page.desk.space)
    assert command.run == "runs/run" and command.makes_run
    (page.folder / "runs" / "run").mkdir()
    assert commands.of("train", {"settings": SETTINGS}, page.desk.space).run == "runs/run-2"
    over = {**SETTINGS, "output": "a", "overwrite": True}
    assert commands.of("train", {"settings": over}, page.desk.space).run == "runs/a"


def test_exports_and_evaluations_are_named_after_the_run(page):
    space = page.desk.space
    export = commands.of("export", {"run": "a", "formats": ["gguf:q8_0", "merged-16bit"]}, space)
    assert export.shown == (
        "finegraft export runs/a --to gguf:q8_0,merged-16bit --output exports/a"
    )
    evaluate = commands.of("eval", {"run": "a", "data": "data/rows.jsonl", "vs": "base"}, space)
    assert evaluate.shown == "finegraft eval runs/a --data data/rows.jsonl --vs base"
    with pytest.raises(ConfigError, match="FG-UI-012"):
        commands.of("exprt", {}, space)


def test_deleting_can_be_undone(page):
    folder = page.folder / "runs" / "a"
    gone = page("DELETE", "/api/runs/a").json
    assert not folder.exists() and page("GET", "/api/runs").json["runs"] == []
    assert gone["command"] == f"mv runs/a .trash/{gone['undo']}/kept"
    assert page("GET", "/api/trash").json["entries"][0]["path"] == "runs/a"
    write_run(folder)
    taken = page("POST", f"/api/trash/{gone['undo']}/restore")
    assert (taken.status, taken.json["error"]["code"]) == (409, "FG-UI-019")
    folder.rename(page.folder / "runs" / "b")
    assert page("POST", f"/api/trash/{gone['undo']}/restore").json["path"] == "runs/a"
    assert page("GET", "/api/runs/a").json["step"] == 3
    again = page("POST", f"/api/trash/{gone['undo']}/restore")
    assert (again.status, again.json["error"]["code"]) == (404, "FG-UI-018")
    page("DELETE", "/api/runs/b")
    assert page("DELETE", "/api/trash").json["freed_bytes"] > 0
    assert page("GET", "/api/trash").json["entries"] == []


def test_notes_stay_with_the_run(page):
    text = "good\n<b>one</b> \U0001f600"
    assert page("PUT", "/api/runs/a/notes", {"text": text}).json["notes"] == text
    assert page("GET", "/api/runs/a").json["notes"] == text
    assert page("GET", "/api/runs").json["runs"][0]["notes"] == text
    page("PUT", "/api/runs/a/notes", {"text": " "})
    assert not (page.folder / "runs" / "a" / "notes.txt").exists()
    assert page("PUT", "/api/runs/a/notes", {"text": "x" * 20_001}).status == 400


def test_rows_are_sent_listed_and_looked_at(page):
    sent = page("PUT", "/api/data/mine.csv", raw=b"text,label\nfine,good\nawful,bad\n")
    assert sent.json == {"path": "data/mine.csv", "size_bytes": 31}
    sample = page("POST", "/api/data/sample").json
    names = {file["path"] for file in page("GET", "/api/data").json["files"]}
    assert names == {"data/rows.jsonl", "data/mine.csv", sample["path"]}
    look = page("GET", f"/api/data/look?path={sample['path']}&from=2&n=2").json
    assert look["rows_total"] == sample["rows"] and look["columns"] == ["prompt", "completion"]
    assert [row["place"] for row in look["rows"]] == [3, 4]
    states = [span["state"] for span in look["rows"][0]["spans"]]
    assert "trained" in states and "read" in states
    assert look["rows"][0]["trained"] < look["rows"][0]["tokens"]
    assert look["command"] == f"finegraft data show {sample['path']} -n 2"
    short = page("GET", f"/api/data/look?path={sample['path']}&n=1&max_length=20").json
    assert short["rows"][0]["cut"] > 0
    labels = page("GET", "/api/data/look?path=data/mine.csv").json
    assert labels["format"] == "text -> label" and labels["error"] is None
    assert labels["rows"][0]["spans"][-1] == {"text": "\ngood", "state": "trained"}
    page("PUT", "/api/data/odd.csv", raw=b"a,b\nfine,good\nawful,bad\n")
    odd = page("GET", "/api/data/look?path=data/odd.csv").json
    assert odd["format"] is None and odd["error"]["code"].startswith("FG-DATA")
    assert odd["rows"][0]["spans"][0]["text"] == "a: fine\nb: good"
    missing = page("GET", "/api/data/look?path=data/none.jsonl")
    assert (missing.status, missing.json["error"]["code"]) == (404, "FG-DATA-001")


def test_two_runs_are_compared(page):
    write_run(page.folder / "runs" / "b", 3, learning_rate=1.0)
    found = page("GET", "/api/compare?a=a&b=b").json
    assert found["command"] == "finegraft compare runs/a runs/b"
    assert found["runs"] == ["runs/a", "runs/b"]
    assert [one["name"] for one in found["differences"]] == ["learning_rate"]
    missing = page("GET", "/api/compare?a=a&b=c")
    assert (missing.status, missing.json["error"]["code"]) == (404, "FG-UI-015")


def test_a_run_that_has_saved_nothing_cannot_be_tried(page):
    answer = page("POST", "/api/try", {"run": "a"})
    assert (answer.status, answer.json["error"]["code"]) == (409, "FG-UI-021")
    assert page("GET", "/api/try").json == {"tries": []}
    answer = page("POST", "/api/try/x/chat", {"messages": []})
    assert (answer.status, answer.json["error"]["code"]) == (404, "FG-UI-020")


def test_what_a_killed_server_left_loaded_is_ended(tmp_path):
    space = Workspace(tmp_path)
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(words, start_new_session=True) as child:
        left = space.own / "try" / "0123456789ab"
        left.mkdir(parents=True)
        (left / "process.json").write_text(json.dumps(vars(Process.of(child.pid))))
        with served(tmp_path):
            assert child.wait(10) == -signal.SIGTERM
    assert not left.exists()
