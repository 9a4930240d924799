"""The ladder as a person runs it: real processes, a tiny model, Ctrl-C, and going on."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
from command_line import COMMAND, environment, finegraft, write_rows

SETTINGS = """
data: rows.jsonl
max_length: 64
max_steps: {steps}
dtype: float32
output: steps
"""
WAIT_SECONDS = 120


@pytest.fixture
def place(base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 30)
    (tmp_path / "ladder.yaml").write_text(f"model: {base}\n" + SETTINGS.format(steps=4))
    return tmp_path


def test_each_rung_is_a_process_and_one_that_fails_stands_in_the_table(place):
    words = ["ladder.yaml", "--methods", "lora,bitfit", "--method-set", "lora.r=2", "--json"]
    done = finegraft("ladder", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    base, lora, bitfit = found["rungs"]
    assert bitfit["error"]["code"] == "FG-ADAPT-023" and base["quality"] > 0
    assert lora["steps"] == 4 and lora["peak_memory_bytes"] > 1e8
    config = json.loads((place / "steps/lora/adapter/adapter_config.json").read_text())
    assert config["r"] == 2
    assert json.loads((place / "steps" / "ladder.json").read_text()) == found
    assert (place / "steps" / "ladder.png").is_file()
    assert "rung 3 of 3: bitfit" in done.stderr
    # again, with one more method: what is done is kept
    before = (place / "steps/lora/events.jsonl").read_text()
    done = finegraft("ladder", "ladder.yaml", "--methods", "lora,ia3", *words[3:], cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rungs"][1] == lora
    assert (place / "steps/lora/events.jsonl").read_text() == before
    assert "rung 2 of 3: lora, done already" in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_command_that_is_shown_goes_on(place, base):
    (place / "ladder.yaml").write_text(f"model: {base}\n" + SETTINGS.format(steps=400))
    command = [*COMMAND, "ladder", "ladder.yaml", "--methods", "lora"]
    events = place / "steps" / "lora" / "events.jsonl"
    process = subprocess.Popen(
        command, cwd=place, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        until = time.monotonic() + WAIT_SECONDS
        while not (events.is_file() and '"step", ' in events.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Go on with:\n  finegraft ladder steps/ladder.yaml\n" in said.decode()
    steps = [e for e in map(json.loads, events.read_text().splitlines()) if e["type"] == "step"]
    stopped = steps[-1]["step"]
    assert (place / "steps" / "lora" / "checkpoints" / f"checkpoint-{stopped}").is_dir()
    done = finegraft("ladder", "steps/ladder.yaml", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    lora = json.loads(done.stdout)["rungs"][1]
    assert lora["steps"] == 400 and lora["error"] is None
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    starts = [e["step"] for e in lines if e["type"] == "start"]
    assert starts == [0, stopped]
