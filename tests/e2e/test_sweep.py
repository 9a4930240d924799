"""A sweep as a person runs it: real processes, a tiny model, SIGKILL, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from command_line import COMMAND, environment, finegraft, write_rows

SETTINGS = """
data: rows.jsonl
eval_fraction: 0.2
max_length: 64
max_steps: {steps}
per_device_train_batch_size: 4
warmup_steps: 0
logging_steps: 1
save_steps: 1000
dtype: float32
report_rows: 0
data_check: false
output: steps
"""
VARIED = ("--set", "r=2,4,8", "--set", "learning_rate=1e-3,1e-2")
WAIT_SECONDS = 120


@pytest.fixture
def place(base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 30)
    (tmp_path / "sweep.yaml").write_text(f"model: {base}\n" + SETTINGS.format(steps=12))
    return tmp_path


def lines(file):
    if not file.is_file():
        return []
    whole = file.read_text()
    return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]


def steps(file):
    return [e["step"] for e in lines(file) if e["type"] == "step"]


def losses(file):
    """The last told loss of each step."""
    return {e["step"]: e["loss"] for e in lines(file) if e["type"] == "step"}


def killed_in(place, events, *varied):
    """Start the sweep of 150 steps a run and kill it when ``events`` tell of five steps."""
    file = place / "sweep.yaml"
    file.write_text(file.read_text().replace("max_steps: 12", "max_steps: 150"))
    with open(place / "said", "w") as said:
        command = [*COMMAND, "sweep", "sweep.yaml", *varied]
        process = subprocess.Popen(
            command, cwd=place, env=environment(), stderr=said, stdout=said, start_new_session=True
        )
    try:
        until = time.monotonic() + WAIT_SECONDS
        while len(steps(events)) < 5:
            assert process.poll() is None and time.monotonic() < until, (place / "said").read_text()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_sweep_survives_sigkill(place):
    events = place / "steps" / "r=4" / "events.jsonl"
    killed_in(place, events, "--set", "r=2,4")
    kept = (place / "steps" / "r=2" / "events.jsonl").read_text()
    done = finegraft("sweep", "sweep.yaml", "--set", "r=2,4", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["steps"] for row in found["runs"]] == [150, 150]
    assert (place / "steps" / "r=2" / "events.jsonl").read_text() == kept
    starts = [e["step"] for e in lines(events) if e["type"] == "start"]
    assert starts[0] == 0 and 5 <= starts[1] < 150 and len(starts) == 2


@pytest.mark.slow
def test_a_sweep_of_six_survives_sigkill_in_the_third(place):
    events = place / "steps" / "r=4,learning_rate=0.001" / "events.jsonl"
    killed_in(place, events, *VARIED)
    first, second = (
        place / "steps" / f"r=2,learning_rate={rate}" / "events.jsonl" for rate in (0.001, 0.01)
    )
    kept = first.read_text(), second.read_text()
    done = finegraft("sweep", "sweep.yaml", *VARIED, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["state"] for row in found["runs"]] == ["finished"] * 6
    assert (first.read_text(), second.read_text()) == kept
    starts = [e["step"] for e in lines(events) if e["type"] == "start"]
    assert starts[0] == 0 and 5 <= starts[1] < 150 and len(starts) == 2  # it was saved and resumed
    assert found["runs"] == sorted(found["runs"], key=lambda row: row["eval_loss"])
    assert found["best"]["name"] == found["runs"][0]["name"]
    assert found == json.loads((place / "steps" / "sweep.json").read_text())
    assert "run 2 of 6: r=2, learning_rate=0.01, done already" in done.stderr
    page = (place / "steps" / "index.html").read_text()
    assert "Held-out loss by learning_rate" in page and "http" not in page.split("<body>")[1]
    # the resumed run is the run that never stopped
    whole = finegraft(
        *("train", "sweep.yaml", "--r", 4, "--learning-rate", "1e-3", "--output", "whole"),
        cwd=place,
    )
    assert whole.returncode == 0, whole.stderr
    assert losses(place / "whole" / "events.jsonl") == losses(events)
    # a changed setting is refused, and shown
    done = finegraft("sweep", "sweep.yaml", *VARIED, "--lora-alpha", 9, cwd=place)
    assert done.returncode == 2
    assert "FG-SWEEP-006" in done.stderr and "lora_alpha 16 -> 9" in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_command_that_is_shown_goes_on(place, base):
    (place / "sweep.yaml").write_text(f"model: {base}\n" + SETTINGS.format(steps=400))
    command = [*COMMAND, "sweep", "sweep.yaml", "--set", "r=2,4"]
    events = place / "steps" / "r=2" / "events.jsonl"
    process = subprocess.Popen(
        command, cwd=place, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        until = time.monotonic() + WAIT_SECONDS
        while len(steps(events)) < 3:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Go on with:\n  finegraft sweep steps/sweep.yaml\n" in said.decode()
    stopped = steps(events)[-1]
    assert (place / "steps" / "r=2" / "checkpoints" / f"checkpoint-{stopped}").is_dir()
    done = finegraft("sweep", "steps/sweep.yaml", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert [row["steps"] for row in json.loads(done.stdout)["runs"]] == [400, 400]
    starts = [e["step"] for e in lines(events) if e["type"] == "start"]
    assert starts == [0, stopped]


@pytest.mark.slow
def test_a_search_stops_a_hopeless_run_and_its_process(place):
    pytest.importorskip("optuna")
    words = ["--set", "learning_rate=1e-5,3e-5,1e-2,3e-2,1e-1", "--eval-steps", 4, "--seed", 3]
    words += ["--max-steps", 40, "--search", "optuna", "--trials", 5, "--json"]
    done = finegraft("sweep", "sweep.yaml", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rates = [row["values"]["learning_rate"] for row in found["runs"]]
    assert sorted(rates) == [1e-5, 3e-5, 1e-2, 3e-2, 1e-1]  # none twice
    pruned = [row for row in found["runs"] if row["state"] == "pruned"]
    assert pruned, [(row["values"], row["loss"]) for row in found["runs"]]
    for row in pruned:
        assert row["steps"] < 40 and row["loss"] is None and row["error"] is None
        told = [e["type"] for e in lines(place / row["run"] / "events.jsonl")]
        assert told[-1] != "end" and "interrupted" in told
    again = finegraft("sweep", "sweep.yaml", *words, cwd=place)
    assert json.loads(again.stdout)["runs"] == found["runs"]
    assert again.stderr.count("done already") == 5
