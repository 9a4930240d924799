"""Runs that are killed, or whose disk fills up, at any instant: they go on to the same bits.

One thread each: float32 encoders with trained LayerNorms are not reproducible with two.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from command_line import environment, write_rows
from killing import Warm

from finegraft.core.journal import by_step, read_events
from finegraft.training import checkpoint, replay

STEPS, INSTANTS = 60, 25
SETTINGS = f"""
data: rows.jsonl
dtype: float32
r: 4
lora_dropout: 0.1
max_length: 64
max_steps: {STEPS}
per_device_train_batch_size: 4
save_steps: 5
eval_fraction: 0.2
eval_steps: 10
learning_rate: 1.0e-3
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    log = tmp_path_factory.mktemp("warm") / "log"
    with Warm(log, environment()) as process:
        yield process


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_rows(folder / "rows.jsonl", 30)
    (folder / "run.yaml").write_text(f"model: {base}\n{SETTINGS}")
    return folder


@pytest.fixture(scope="module")
def whole(place, warm):
    """The run that nothing happened to, with the seconds it took."""
    began = time.monotonic()
    done = warm.run("train", "run.yaml", "--output", "whole", cwd=place)
    assert done["status"] == 0, warm.log.read_text()
    return place / "whole", time.monotonic() - began


def equal(run, whole):
    """Weights, optimizer, schedule, random states, counters and losses are the same."""
    found, expected = (checkpoint.newest(r / "checkpoints") for r in (run, whole))
    assert found[0].name == expected[0].name and not found[1]
    values, differences = replay._compared(found[0], expected[0], [])
    assert values > 10 and not differences, differences
    saved = "adapter" if (whole / "adapter").exists() else "model"
    for file in (whole / saved).glob("*.safetensors"):
        assert (run / saved / file.name).read_bytes() == file.read_bytes()
    told, other = (read_events(r / "events.jsonl") for r in (run, whole))
    for kind in ("step", "eval"):
        lines = [sorted((e["step"], e["loss"]) for e in by_step(es, kind)) for es in (told, other)]
        assert lines[0] == lines[1]
    assert told[-1]["type"] == other[-1]["type"] == "end"
    assert told[-1]["tokens"] == other[-1]["tokens"]
    # killed after its end, nobody has to take the lock over
    assert not [p for p in run.rglob(".*") if p.name != ".lock"]


def go_on(warm, place, name):
    """What a person does after a crash: resume; start again where there is no run yet."""
    if (place / name / "config.yaml").exists():
        done = warm.run("resume", name, cwd=place)
    else:
        done = warm.run("train", "run.yaml", "--output", name, cwd=place)
    assert done["status"] == 0, warm.log.read_text()[-3000:]


# before the manifest of the second checkpoint; before it gets its name; while the first one is
# being removed, after the third; before the adapter gets its name; before the first checkpoint
INSTANTS_NAMED = {
    "before the manifest": {"event": "open", "match": "checkpoint-10/manifest.json", "at": 1},
    "before the name": {"event": "os.rename", "match": ".checkpoint-10.partial", "at": 1},
    "while rotating": {"event": "os.remove", "match": "optimizer.pt", "at": 1},
    "before the adapter": {"event": "os.rename", "match": ".adapter.", "at": 1},
}


@pytest.mark.parametrize("name", INSTANTS_NAMED)
def test_killed_while_saving(place, warm, whole, name):
    folder = name.replace(" ", "-")
    done = warm.run("train", "run.yaml", "--output", folder, cwd=place, die=INSTANTS_NAMED[name])
    assert done["status"] == -signal.SIGKILL
    go_on(warm, place, folder)
    equal(place / folder, whole[0])


def test_killed_twice_in_steps_and_with_a_cut_line_of_events(place, warm, whole):
    for number, words in enumerate(
        (["train", "run.yaml", "--output", "steps"], ["resume", "steps"])
    ):
        pid = warm.start(*words, cwd=place)
        events = place / "steps" / "events.jsonl"
        reached = 13 + 20 * number
        began = time.monotonic()
        while not events.exists() or len(by_step(read_events(events), "step")) < reached:
            assert time.monotonic() - began < 60, warm.log.read_text()
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert warm.wait()["status"] == -signal.SIGKILL
        with open(events, "a") as lines:
            lines.write('{"type": "step", "time": 17')
    go_on(warm, place, "steps")
    equal(place / "steps", whole[0])
    lines = events.read_text().splitlines()
    assert (
        sum(line == '{"type": "step", "time": 17' for line in lines) == 2
    )  # on lines of their own


LABELLED = [
    {"text": f"{i} and {i}? it is {2 * i}", "label": ["even", "odd"][i % 2]} for i in range(40)
]
TAGGED = [
    {"tokens": ["it", "is", str(i), "now"], "tags": ["O", "O", "B-number", "O"]} for i in range(40)
]
MARKED = [{"prompt": f"{i}?", "completion": f"<sum> {2 * i}."} for i in range(40)]
VARIANTS = {
    "packing": ({"packing": True}, None),
    "eva": ({"init_lora_weights": "eva"}, None),
    "new tokens": ({"new_tokens": "<sum>"}, MARKED),
    "full": ({"method": "full", "lora_dropout": 0, "r": 16}, None),
    "full in bfloat16": ({"method": "full", "lora_dropout": 0, "r": 16, "dtype": "bfloat16"}, None),
    "four bits": ({"load_in_4bit": True}, None),
    "classification": ({"task": "classification"}, LABELLED),
    "token classification": ({"task": "token_classification"}, TAGGED),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_whatever_is_trained(place, warm, name):
    changes, rows = VARIANTS[name]
    slug = name.replace(" ", "-")
    words = ["train", "run.yaml", "--max-steps", "12", "--save-steps", "3", "--eval-steps", "4"]
    for key, value in changes.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, value]
    if rows:
        words += ["--data", write_rows(place / f"{slug}.jsonl", rows).name]
    done = warm.run(*words, "--output", f"{slug}-whole", cwd=place)
    assert done["status"] == 0, warm.log.read_text()[-3000:]
    die = {"event": "open", "match": "checkpoint-9/manifest.json", "at": 1}
    if "classification" in name:  # while the evaluation after step 8 is going to be saved
        die["match"] = "checkpoint-8/manifest.json"
    done = warm.run(*words, "--output", slug, cwd=place, die=die)
    assert done["status"] == -signal.SIGKILL
    assert warm.run("resume", slug, cwd=place)["status"] == 0, warm.log.read_text()[-3000:]
    start = [e for e in read_events(place / slug / "events.jsonl") if e["type"] == "start"][-1]
    assert start["step"] == 6
    equal(place / slug, place / f"{slug}-whole")


@pytest.mark.slow
def test_killed_at_random_times(place, warm, whole):
    dice, seconds = random.Random(0), whole[1]
    for i in range(INSTANTS):
        name = f"time-{i}"
        pid = warm.start("train", "run.yaml", "--output", name, cwd=place)
        time.sleep(dice.uniform(0.05, seconds))
        os.kill(pid, signal.SIGKILL)
        warm.wait()
        go_on(warm, place, name)
        equal(place / name, whole[0])
        shutil.rmtree(place / name)


@pytest.mark.slow
def test_killed_at_random_operations_on_files(place, warm, whole):
    """Also twice in one run: the resumed process is killed as well."""
    count = warm.run(
        "train", "run.yaml", "--output", "count", cwd=place, die={"at": 0, "match": "count"}
    )
    assert count["count"] > 300
    dice = random.Random(1)
    for i in range(INSTANTS):
        name, at = f"files-{i}", dice.randrange(1, count["count"])
        die = {"at": at, "match": name}
        done = warm.run("train", "run.yaml", "--output", name, cwd=place, die=die)
        assert done["status"] == -signal.SIGKILL
        if (place / name / "config.yaml").exists() and i % 2:
            die = {"at": dice.randrange(1, 200), "match": name}
            warm.run("resume", name, cwd=place, die=die)
        go_on(warm, place, name)
        equal(place / name, whole[0])
        shutil.rmtree(place / name)


def own_disk():
    """The command that gives a process a small disk at ``$DISK``; None where that is refused."""
    for flags in ("-m", "-rm"):
        probe = ["unshare", flags, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and not subprocess.run(probe, capture_output=True).returncode:
            script = 'mount -t tmpfs -o size=64M none "$DISK" && exec "$@"'
            return ("unshare", flags, "sh", "-c", script, "sh")
    return None


def filled(place, whole, tmp_path, instants, seed):
    """Fill the disk of runs at random instants until ``instants`` were hit; free it, resume."""
    prefix = own_disk()
    if prefix is None:
        pytest.skip("needs a small disk of its own, and nothing may be mounted here")
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    dice, statuses = random.Random(seed), []
    with Warm(log, environment(DISK=str(disk), PYTHONDONTWRITEBYTECODE="1"), prefix) as warm:
        while statuses.count(2) < instants:  # a run that ends before the disk is full is none
            assert len(statuses) < 4 * instants + 4, statuses
            run = disk / f"run-{len(statuses)}"
            warm.start("train", place / "run.yaml", "--output", run, cwd=place)
            time.sleep(dice.uniform(0.3, 0.75 * whole[1]))
            warm.do("fill", folder=str(disk))
            statuses.append(warm.wait()["status"])
            warm.do("free", folder=str(disk))
            text = log.read_text()
            assert statuses[-1] in (0, 2) and "Traceback" not in text, text[-3000:]
            if statuses[-1] == 2:
                assert "FG-DISK-001" in text.rsplit("checking data", 1)[-1], text[-3000:]
            if warm.do("exists", path=str(run / "config.yaml"))["exists"]:
                done = warm.run("resume", run, cwd=place)
            else:
                done = warm.run("train", place / "run.yaml", "--output", run, cwd=place)
            assert done["status"] == 0, log.read_text()[-3000:]
            warm.do("copy", source=str(run), target=str(tmp_path / run.name))
            equal(tmp_path / run.name, whole[0])
            warm.do("remove", folder=str(run))


def test_a_disk_that_fills_up_at_a_random_instant(place, whole, tmp_path):
    filled(place, whole, tmp_path, instants=2, seed=5)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_many_random_instants(place, whole, tmp_path):
    filled(place, whole, tmp_path, INSTANTS, seed=6)
