"""`runs`, `compare` and `report`, and what they make of planted differences and huge files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_tiny import llama, rows, tokenizer
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.errors import ConfigError
from finegraft.core.schema import build
from finegraft.training import record
from finegraft.training.report import differences, read, reasons
from finegraft.training.run import train

LONG = " ".join(["hello world now you are so very kind today bye"] * 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, and one run that everything is compared with."""
    folder = tmp_path_factory.mktemp("runs")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    write(folder / "rows.jsonl", [{"prompt": "hello", "completion": LONG}, *rows(15)])
    run(folder, "a")
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder, name, **changes):
    values = {"model": str(folder / "base"), "data": str(folder / "rows.jsonl"), "max_length": 96}
    values |= {"max_steps": 8, "save_steps": 50, "learning_rate": 1e-3, "warmup_steps": 1}
    values |= {"output": str(folder / "runs" / name), "report_rows": 0, "eval_fraction": 0.2}
    return train(build({**values, **changes}))


def asked(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def compared(folder, name):
    return differences.compare(folder / "runs" / "a", folder / "runs" / name)


def changed_row(lines):
    lines[3] = {**lines[3], "completion": "bye bye bye"}
    return lines


PLANTED = {
    "learning_rate": ({"learning_rate": 2e-2}, "settings"),
    "r": ({"r": 2}, "settings"),
    "seed": ({"seed": 1}, "settings"),
    "chat_template": ({"chat_template": "chatml"}, "settings"),
    "max_length": ({"max_length": 48}, "settings"),
    "dtype": ({"dtype": "bfloat16"}, "settings"),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 2}, "settings"),
    "method": ({"method": "bottleneck"}, "settings"),
    "rows": (changed_row, "data"),
    "order": (lambda lines: lines[:12][::-1] + lines[12:], "data"),
    "transformers": ("versions", "versions"),
    "max_steps": ({"max_steps": 4}, "settings"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_difference_is_named_first(place, name, monkeypatch):
    change, kind = PLANTED[name]
    if callable(change):
        lines = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
        write(place / f"{name}-changed.jsonl", change(lines))
        run(place, name, data=str(place / f"{name}-changed.jsonl"))
    elif change == "versions":
        installed = record.metadata.version
        monkeypatch.setattr(
            record.metadata,
            "version",
            lambda library: "4.50.0" if library == "transformers" else installed(library),
        )
        run(place, name)
    else:
        run(place, name, **change)
    found = compared(place, name)
    first = found["differences"][0]
    assert (first["kind"], first["name"], first["likely"]) == (kind, name, True), found
    assert len([d for d in found["differences"] if d["likely"]]) == 1, found
    assert name in found["verdict"]
    if name == "rows":
        assert "row 4 changed" in first["reason"]
    if name == "max_length":
        assert "0 rows are cut in A, 1 in B" in first["reason"]


def test_two_equal_runs_do_not_differ(place):
    run(place, "again")
    found = compared(place, "again")
    assert found["differences"] == [] and found["apart_from_step"] is None
    assert "Nothing differs" in found["verdict"] and found["same_start"] is True


def test_another_base_under_the_same_name_is_noticed(place):
    folder = place / "other"
    folder.mkdir()
    write(
        folder / "rows.jsonl",
        [json.loads(s) for s in (place / "rows.jsonl").read_text().splitlines()],
    )
    llama(seed=1).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    run(folder, "b")
    os.rename(folder / "runs" / "b", place / "runs" / "based")
    events = place / "runs" / "based" / "events.jsonl"
    events.write_text(events.read_text().replace(str(folder / "base"), str(place / "base")))
    found = compared(place, "based")
    assert [d["name"] for d in found["differences"] if d["likely"]] == ["base weights"]


def test_what_does_not_matter_is_not_blamed(place):
    run(place, "saves", save_steps=3, logging_steps=2)
    found = compared(place, "saves")
    assert {d["name"] for d in found["differences"]} == {"save_steps", "logging_steps"}
    assert "does not usually change" in found["verdict"]


def test_a_length_that_cuts_nothing_is_not_blamed(place):
    run(place, "longer", max_length=128)
    assert not compared(place, "longer")["differences"][0]["likely"]


def test_every_setting_has_a_reason():
    from finegraft.core.schema import TrainConfig

    assert set(reasons.SETTINGS) - set(TrainConfig.model_fields) == set()
    assert all(reasons.of_setting(name).words for name in TrainConfig.model_fields)


def test_compare_shows_a_table_and_one_object(place):
    run(place, "shown", learning_rate=5e-3)
    pair = (place / "runs" / "a", place / "runs" / "shown")
    text = asked("compare", *pair)
    assert text.startswith("Likely matters most: learning_rate") and "last loss" in text
    found = json.loads(asked("compare", *pair, "--json"))
    assert {"runs", "verdict", "differences", "results", "same_start"} <= set(found)
    assert found["differences"][0]["likely"] is True


def test_the_list_has_every_run(place):
    found = json.loads(asked("runs", place / "runs", "--json"))
    a = next(line for line in found["runs"] if line["name"] == "a")
    assert (a["state"], a["step"], a["method"], a["error"]) == ("finished", 8, "lora", None)
    assert a["loss"] > 0 and a["eval_loss"] > 0 and a["tokens_per_second"] > 0
    assert len(found["runs"]) == len(list((place / "runs").iterdir()))
    started = [line["started"] for line in found["runs"]]
    assert started == sorted(started, reverse=True)
    text = asked("runs", place / "runs")
    assert "finished" in text and "lora" in text and "rows.jsonl" in text


def test_report_draws_the_page_anew(place):
    page = place / "runs" / "a" / "report" / "index.html"
    page.unlink()
    assert json.loads(asked("report", place / "runs" / "a", "--json"))["report"] == str(page)
    assert "finished" in page.read_text()


def events(folder, lines):
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def begun(pid, started):
    import socket

    process = {"pid": pid, "started": started, "host": socket.gethostname()}
    return {"type": "run", "time": 1.0, "config": {"model": "m"}, "process": process}


STEP = {"type": "step", "time": 2.0, "step": 3, "total_steps": 9, "loss": 1.5, "seconds": 4.0}


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ([], "running"),
        ([{"type": "interrupted", "time": 3.0, "step": 3}], "stopped"),
        ([{"type": "stopped", "time": 3.0}], "stopped"),
        ([{"type": "failed", "time": 3.0, "code": "FG-X-001"}], "failed"),
        ([{"type": "end", "time": 3.0, "step": 9, "seconds": 5.0, "tokens": 50}], "finished"),
    ],
)
def test_states(tmp_path, last, state):
    me = psutil.Process()
    one = events(tmp_path / "one", [begun(me.pid, me.create_time()), STEP, *last])
    found = read.summary(one)
    assert (found.state, found.loss, found.total_steps) == (state, 1.5, 9)
    resumed = [begun(me.pid, me.create_time()), STEP, *last, begun(me.pid, me.create_time())]
    assert read.summary(events(tmp_path / "two", resumed)).state == "running"


def test_a_process_that_is_gone_was_killed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    killed = events(tmp_path / "gone", [begun(gone.pid, time.time()), STEP])
    assert read.summary(killed).state == "killed"
    me = psutil.Process()  # the same number, given to a later process
    reused = events(tmp_path / "reused", [begun(me.pid, me.create_time() - 1000), STEP])
    assert read.summary(reused).state == "killed"


def test_torn_and_empty_files_are_read(tmp_path):
    torn = events(tmp_path / "torn", [STEP, {**STEP, "step": 4}])
    with open(torn / "events.jsonl", "a") as out:
        out.write('{"type": "step", "time": 5.0, "st')
    assert read.summary(torn).step == 4
    assert [e["step"] for e in read.history(torn).of("step")] == [3, 4]
    empty = events(tmp_path / "empty", [])
    assert read.summary(empty).state == "killed" and read.summary(empty).step == 0


def test_a_resumed_run_has_each_step_once(tmp_path):
    told = [
        {**STEP, "step": s, "loss": float(v)} for s, v in ((1, 9), (2, 8), (3, 7), (2, 6), (3, 5))
    ]
    found = read.history(events(tmp_path / "run", told)).of("step")
    assert [(e["step"], e["loss"]) for e in found] == [(1, 9.0), (2, 6.0), (3, 5.0)]


def test_two_hundred_thousand_events_are_read_in_two_seconds(tmp_path):
    folder = tmp_path / "runs" / "long"
    folder.mkdir(parents=True)
    line = {**STEP, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 900.0}
    with open(folder / "events.jsonl", "w") as out:
        out.write(json.dumps(begun(1, 1.0)) + "\n")
        for step in range(1, 200_001):
            out.write(json.dumps({**line, "step": step, "total_steps": 200_000}) + "\n")
            if step == 100_000:
                out.write(
                    json.dumps({"type": "eval", "time": 2.0, "step": step, "loss": 0.7}) + "\n"
                )
    began = time.perf_counter()
    (found,) = [read.summary(path) for path in read.runs(tmp_path / "runs")]
    told = read.history(folder)
    seconds = time.perf_counter() - began
    assert (found.step, found.eval_loss) == (200_000, 0.7) and seconds < 2
    steps = told.of("step")
    assert 1000 < len(steps) <= read.MOST_STEPS and steps[-1]["step"] == 200_000
    assert told.stride == 100 and told.last("eval")["loss"] == 0.7


def test_listing_imports_no_torch(tmp_path):
    code = (
        "import sys; from finegraft.training.report import read, differences, page; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_mistakes_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "No runs in runs" in asked("runs")
    missing = CliRunner().invoke(app, ["runs", "nowhere"])
    assert missing.exit_code == 2 and "FG-RUN-023" in missing.output
    events(Path("runs/first"), [STEP])
    with pytest.raises(ConfigError, match=r"(?s)FG-RUN-020.*runs/first.*did you mean"):
        read.require_run(Path("runs/frist"))
    wrong = CliRunner().invoke(app, ["compare", "runs/first", "runs/none"])
    assert wrong.exit_code == 2 and "FG-RUN-020" in wrong.output
