"""Runs that are stopped, and what can be done with them: the real command, a tiny real model."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import COMMAND, environment, finegraft, write_rows

STEPS = 150  # 30 rows in batches of 4: 8 steps an epoch, so 150 ends in the middle of one
SETTINGS = f"""
data: rows.jsonl
r: 4
lora_dropout: 0.1
max_length: 64
max_steps: {STEPS}
per_device_train_batch_size: 4
save_steps: 10
learning_rate: 1.0e-3
"""
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    """A working folder with settings and rows."""
    folder = tmp_path_factory.mktemp("interrupt")
    write_rows(folder / "rows.jsonl", 30)
    (folder / "run.yaml").write_text(f"model: {base}\n{SETTINGS}")
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """The run that nobody stopped."""
    return train(place, "whole")


def train(place, name, *words):
    done = finegraft("train", "run.yaml", "--output", name, *words, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / name


def events(run, kind):
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [e for e in map(json.loads, lines) if e["type"] == kind]


def losses(run):
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events(run, "step")}


def checkpoints(run):
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").iterdir())


def wait(process, reached):
    began = time.monotonic()
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < WAIT_SECONDS
        time.sleep(0.005)


def start(place, *words):
    return subprocess.Popen(
        [*COMMAND, *words],
        cwd=place,
        env=environment(PYTHONUNBUFFERED="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run started in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def stop(place, name, *words, at=20, number=signal.SIGINT):
    """Train and send a signal after ``at`` steps; return status, stdout and stderr."""
    process = start(place, "train", "run.yaml", "--output", name, *words)
    wait(process, lambda: len(events(place / name, "step")) >= at)
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert "Traceback" not in out + err
    return process.returncode, out, err


def printed_command(text):
    lines = [line.strip() for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("finegraft resume ")]
    assert len(commands) == 1, text
    return shlex.split(commands[0])[1:]


def same_bytes(one, other, name="adapter/adapter_model.safetensors"):
    return (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(place, whole, number):
    name = f"stopped by {number.name}"  # a space, so that the printed command has to be quoted
    status, out, err = stop(place, name, number=number)
    run = place / name
    assert status == 130
    assert err.count("finishing this step") == 1
    step = events(run, "interrupted")[0]["step"]
    assert 20 <= step < STEPS
    assert checkpoints(run)[-1] == step
    assert not (run / "adapter").exists()
    assert not list(run.rglob(".*"))
    before = losses(run)
    assert max(before) == step

    done = finegraft(*printed_command(out), cwd=place)
    assert done.returncode == 0, done.stderr
    assert events(run, "start")[-1]["step"] == step
    assert losses(run) == losses(whole)
    assert len(events(run, "step")) == STEPS  # no step twice, none left out
    assert same_bytes(run, whole)


def test_packing_and_evaluation_resume_as_well(place):
    words = ["--packing", "--eval-fraction", "0.2", "--eval-steps", "8", "--max-steps", "40"]
    status, out, _ = stop(place, "packed", *words, at=12)
    assert status == 130
    assert finegraft(*printed_command(out), cwd=place).returncode == 0
    other = train(place, "packed-whole", *words)
    assert losses(place / "packed") == losses(other)
    held_out = [(e["step"], e["loss"]) for e in events(place / "packed", "eval")]
    assert held_out == [(e["step"], e["loss"]) for e in events(other, "eval")]
    assert [step for step, _ in held_out] == [8, 16, 24, 32, 40]
    assert same_bytes(place / "packed", other)


def test_a_second_ctrl_c_stops_at_once_and_older_checkpoints_stay_whole(place, whole):
    process = start(place, "train", "run.yaml", "--output", "twice")
    run = place / "twice"
    wait(process, lambda: len(events(run, "step")) >= 15)
    process.send_signal(signal.SIGINT)
    wait(process, lambda: events(run, "notice"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    # the step was done before the second one came, or it was not: both end well
    command = printed_command(out + err)
    assert not list(run.rglob(".*"))
    for step in checkpoints(run):
        state = json.loads((run / f"checkpoints/checkpoint-{step}/trainer_state.json").read_text())
        assert state["global_step"] == step
    assert finegraft(*command, cwd=place).returncode == 0
    assert same_bytes(run, whole)


def test_a_second_ctrl_c_while_the_step_cannot_end(place):
    """Frozen in the middle of a step, both signals wait; thawed, both are there at once."""
    process = start(place, "train", "run.yaml", "--output", "frozen")
    run = place / "frozen"
    wait(process, lambda: len(events(run, "step")) >= 15)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert checkpoints(run) == [10]  # nothing was saved on the way out
    assert not events(run, "interrupted")
    assert not list(run.rglob(".*"))
    assert err.splitlines()[-3:] == [
        "stopped by Ctrl-C",
        "Go on with:",
        "  finegraft resume frozen",
    ]


def test_a_run_killed_before_its_first_checkpoint_starts_again(place, whole):
    run = place / "killed"
    process = start(place, "train", "run.yaml", "--output", "killed")
    wait(process, lambda: len(events(run, "step")) >= 3)
    process.kill()
    process.communicate()
    if (run / "checkpoints").exists():
        for step in checkpoints(run):  # on a fast machine it came further than three steps
            subprocess.run(["rm", "-r", run / f"checkpoints/checkpoint-{step}"], check=True)
    assert finegraft("resume", "killed", cwd=place).returncode == 0
    assert same_bytes(run, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["starting", "checking data", "loading model"])
def test_a_stop_before_training_leaves_no_folder(place, phase, number):
    name = f"early-{number}-{phase.replace(' ', '-')}"
    process = start(place, "train", "run.yaml", "--output", f"{name}/deep")
    if phase == "starting":  # libraries are being imported, and nothing is written yet
        time.sleep(1.5)
    else:
        assert process.stderr is not None
        assert any(phase in line for line in process.stderr)
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert process.returncode == 130, err
    assert err.strip().endswith(f"stopped by {by}")
    assert "Traceback" not in out + err
    assert not (place / name / "deep").exists()


def test_resuming_a_finished_run_says_so_and_changes_nothing(place, whole):
    before = contents(whole)
    done = finegraft("resume", "whole", cwd=place)
    assert done.returncode == 0
    assert "whole is finished" in done.stderr
    assert "finegraft chat whole" in done.stdout
    done = finegraft("resume", "whole", "--json", cwd=place)
    values = json.loads(done.stdout)
    assert (values["steps"], values["interrupted"]) == (STEPS, False)
    assert values["adapter"] == "whole/adapter"
    assert contents(whole) == before


def test_a_run_whose_adapter_was_lost_gets_it_back_without_a_further_step(place, whole):
    run = train(place, "lost")
    subprocess.run(["rm", "-r", run / "adapter"], check=True)
    done = finegraft("resume", "lost", "--json", cwd=place)
    assert json.loads(done.stdout)["steps"] == STEPS
    assert checkpoints(run)[-1] == STEPS
    assert same_bytes(run, whole)


def test_changed_rows_are_refused(place):
    rows = write_rows(place / "own.jsonl", 30)
    status, out, _ = stop(place, "changed", "--data", "own.jsonl")
    assert status == 130
    rows.write_text(rows.read_text().replace("It is 2.", "It was 2."))
    before = contents(place / "changed")
    done = finegraft(*printed_command(out), "--json", cwd=place)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "FG-RUN-003"
    assert "own.jsonl" in error["found"]
    assert contents(place / "changed") == before


def test_a_run_is_never_written_over_by_accident(place, whole):
    before = contents(whole)
    done = finegraft("train", "run.yaml", "--output", "whole", "--json", cwd=place)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "FG-RUN-002"
    assert "finegraft resume whole" in error["fix"]
    assert contents(whole) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
