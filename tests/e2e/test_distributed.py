"""Several processes train what one process trains, and go on after they lose one another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from command_line import COMMAND, environment, write_rows
from safetensors.torch import load_file
from several import Several

from finegraft.core.journal import by_step, read_events
from finegraft.training import checkpoint, manifest

SAME = 1e-5
ROWS = [
    {"prompt": f"{i} and {i}?" + " x" * (i % 7), "completion": f"It is {2 * i}." + "!" * (i % 11)}
    for i in range(37)
]
LABELLED = [
    {"text": f"{i} and {i}? it is {2 * i}", "label": ["even", "odd"][i % 2]} for i in range(38)
]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    log = tmp_path_factory.mktemp("several") / "log"
    with Several(log, environment()) as process:
        yield process


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "labelled.jsonl", LABELLED)
    return folder


@pytest.fixture(scope="module")
def settings(base):
    def made(output, **changes):
        values = {
            "model": str(base),
            "data": "rows.jsonl",
            "output": output,
            "dtype": "float32",
            "r": 4,
            "max_length": 96,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "save_steps": 4,
            "eval_fraction": 0.1,
            "eval_steps": 4,
            "learning_rate": 1e-3,
        }
        if changes.get("method") == "full":
            values.pop("r")  # it has none
        return {**values, **changes}

    return made


def one_process(several, place, settings, changes):
    """The run of one process with these settings, trained once."""
    changes = {k: v for k, v in changes.items() if (k, v) != ("gradient_accumulation_steps", 1)}
    name = "one-" + hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]
    run = place / name
    return run if run.exists() else several.good(settings(name, **changes), place)


def told(run, kind="step", key="loss"):
    return [(e["step"], e[key]) for e in by_step(read_events(run / "events.jsonl"), kind)]


def weights(run):
    if (run / "model").exists():
        return load_file(run / "model" / "model.safetensors")
    return load_file(run / "adapter" / "adapter_model.safetensors")


def difference(run, whole):
    """The largest relative difference of any loss or adapter matrix."""
    found = []
    for kind in ("step", "eval"):
        pairs = list(zip(told(run, kind), told(whole, kind), strict=True))
        assert pairs and all(a[0] == b[0] for a, b in pairs)
        found += [abs(a[1] - b[1]) / abs(b[1]) for a, b in pairs]
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    found += [float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in theirs]
    return max(found)


SLOW = pytest.mark.slow
VARIANTS = {
    "ddp": {},
    "packed, accumulating": {
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "classes": {"task": "classification", "data": "labelled.jsonl", "eval_fraction": 0.2},
    "four bits": {"load_in_4bit": True},
    "all weights": {"method": "full", "learning_rate": 1e-4},
    "streamed": {"streaming": "true"},
    "streamed packed": {"streaming": "true", "packing": True},
    "fsdp2": {"sharding": "fsdp2"},
    "fsdp2 all": {"sharding": "fsdp2", "method": "full", "learning_rate": 1e-4},
    "fsdp2 recomputed": {"sharding": "fsdp2", "gradient_checkpointing": True},
}
QUICK = ("packed, accumulating", "fsdp2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else SLOW) for n in VARIANTS]
)
def test_two_processes_train_what_one_does(several, place, settings, name):
    slug = name.replace(",", "").replace(" ", "-")
    changes = {"per_device_train_batch_size": 2, **VARIANTS[name]}
    rows = changes["per_device_train_batch_size"] * changes.get("gradient_accumulation_steps", 1)
    alone = {**changes, "per_device_train_batch_size": 2 * rows, "gradient_accumulation_steps": 1}
    alone.pop("sharding", None)
    whole = one_process(several, place, settings, alone)
    run = several.good(settings(slug, nproc=2, **changes), place)
    assert difference(run, whole) < SAME
    ends = [read_events(r / "events.jsonl")[-1] for r in (run, whole)]
    assert ends[0]["type"] == "end" and ends[0]["tokens"] == ends[1]["tokens"]
    learnt = [v for k, v in weights(run).items() if "lora_B" in k]  # zero before the first step
    assert changes.get("method") == "full" or (learnt and all(v.abs().max() > 0 for v in learnt))
    start = next(e for e in read_events(run / "events.jsonl") if e["type"] == "start")
    assert (start["processes"], start["batch"]) == (2, 2 * rows)
    if "sharding" in changes:  # half of two layers: attention, gated MLP and norms in float32
        layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
        assert start["sharded_bytes"] == 2 * layer * 4 // 2


def back_to(run, copy, step):
    """A copy of a run that was stopped at a step."""
    shutil.copytree(run, copy)
    for path in checkpoint.checkpoints(copy / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    for saved in ("adapter", "model"):
        shutil.rmtree(copy / saved, ignore_errors=True)


def test_a_checkpoint_of_four_goes_on_with_two_and_with_one(several, place, settings):
    whole = one_process(several, place, settings, {"per_device_train_batch_size": 4})
    four = several.good(
        settings("portion-four", nproc=4, per_device_train_batch_size=1, save_total_limit=4), place
    )
    for processes in (2, 1):
        name = f"portion-{processes}-of-4"
        back_to(four, place / name, 4)
        values = settings(name, nproc=processes, per_device_train_batch_size=1)
        values["gradient_accumulation_steps"] = 4 // processes
        values["sharding"] = "fsdp2" if processes > 1 else "none"  # the checkpoint is the same
        run = several.good(values, place, resume=True)
        events = read_events(run / "events.jsonl")
        starts = [e for e in events if e["type"] == "start"]
        assert [e["step"] for e in starts] == [0, 4]
        assert any("nproc was changed: 4 ->" in e.get("message", "") for e in events)
        assert difference(run, whole) < SAME
        saved = manifest.read(checkpoint.checkpoints(run / "checkpoints")[-1])
        assert saved["processes"] == processes


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_demo_model_in_two_processes(several, place, settings, sharding):
    values = {"model": "demo", "max_steps": 4, "save_steps": 2, "eval_steps": 2, "r": 16}
    whole = several.good(settings(f"demo-{sharding}-one", **values), place)
    values |= {"nproc": 2, "per_device_train_batch_size": 2, "sharding": sharding}
    run = several.good(settings(f"demo-{sharding}", **values), place)
    assert difference(run, whole) < SAME


@pytest.mark.slow
def test_split_optimizers_go_on_with_another_number(several, place, settings):
    """Full fine-tuning with fsdp2: every process has written its part of the optimizer."""
    changes = {"method": "full", "learning_rate": 1e-4, "save_total_limit": 4}
    whole = several.good(settings("parts-one", **changes), place)
    split = {**changes, "sharding": "fsdp2", "per_device_train_batch_size": 1}
    four = several.good(settings("parts-four", nproc=4, **split), place)
    parts = checkpoint.checkpoints(four / "checkpoints")[0] / "optimizer"
    assert len(list(parts.glob("*.distcp"))) == 4
    for processes in (2, 1):
        name = f"parts-{processes}-of-4"
        back_to(four, place / name, 4)
        values = settings(name, nproc=processes, **split)
        values["gradient_accumulation_steps"] = 4 // processes
        if processes == 1:
            values["sharding"] = "none"
        assert difference(several.good(values, place, resume=True), whole) < SAME


def steps_of(run):
    file = run / "events.jsonl"
    return len(by_step(read_events(file), "step")) if file.exists() else 0


def reach(run, count, process, log):
    until = time.monotonic() + 90
    while steps_of(run) < count:
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.02)


def workers(process):
    found = psutil.Process(process.pid).children()
    return [p for p in found if "finegraft.cli.launch" in " ".join(p.cmdline())]


def start(words, place, log, **env):
    with open(log, "wb") as out:
        return subprocess.Popen(
            [*COMMAND, *map(str, words)],
            cwd=place,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def test_a_killed_worker_a_new_start_ctrl_c_and_another_number(
    several, place, settings, base, tmp_path
):
    """The whole life of a launched run, which ends as the run that nothing happened to."""
    values = settings("lived", nproc=2, per_device_train_batch_size=2, max_steps=160)
    values |= {"save_steps": 10, "eval_steps": 80}
    words = ["train", *(f"--{k.replace('_', '-')}={v}" for k, v in values.items())]
    log, run = tmp_path / "log", place / "lived"
    process = start(words, place, log)
    try:
        reach(run, 20, process, log)
        lost = workers(process)
        assert len(lost) == 2
        os.kill(lost[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        at = steps_of(run)
        reach(run, at + 20, process, log)
        assert time.monotonic() - killed < 30
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        if process.poll() is None:
            process.kill()
    text = log.read_text()
    assert text.count("ended by SIGKILL") == 1 and "(restart 1 of 3)" in text
    assert "finegraft resume lived" in text and "Traceback" not in text and "gloo" not in text
    events = read_events(run / "events.jsonl")
    starts = [e["step"] for e in events if e["type"] == "start"]
    assert starts[0] == 0 and at - 10 <= starts[1] <= at
    stopped = events[-1]["step"]
    assert events[-1]["type"] == "interrupted"
    assert checkpoint.step_of(checkpoint.newest(run / "checkpoints")[0]) == stopped
    more = {"nproc": 1, "per_device_train_batch_size": 4}
    several.good({**values, **more}, place, resume=True)
    alone = {**values, **more, "output": "lived-one"}
    assert difference(run, several.good(alone, place)) < 1e-3  # 160 steps of rounding


def no_namespaces():
    """Why no two machines can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "needs iproute2"
    if subprocess.run(["ip", "netns", "add", "fg-probe"], capture_output=True).returncode:
        return "network namespaces may not be made here"
    subprocess.run(["ip", "netns", "del", "fg-probe"], check=True)
    return None


@pytest.fixture
def machines():
    """Two network namespaces joined by a cable; yields names and what cuts and mends it."""
    reason = no_namespaces()
    if reason:
        pytest.skip(reason)

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = ["fg-left", "fg-right"]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        ip("netns", "add", name)
    try:
        ip(
            "link",
            "add",
            "fgl",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "fgr",
            "netns",
            names[1],
        )
        for number, (name, link) in enumerate(zip(names, ("fgl", "fgr"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")

        def cable(state):
            ip("-n", names[0], "link", "set", "fgl", state)

        yield names, cable
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 8, 50], ids=["whole", "short cut", "long cut"])
def test_two_machines_train_and_outlive_a_cut_cable(
    several, place, settings, machines, tmp_path, seconds
):
    names, cable = machines
    values = settings(f"machines-{seconds}", per_device_train_batch_size=2, learning_rate=1e-4)
    values |= {"max_steps": 1200 if seconds else 200, "save_steps": 50, "eval_steps": 600}
    values |= {"nnodes": 2, "save_total_limit": 3}
    run, logs, processes = place / values["output"], [], []
    words = ["train", *(f"--{k.replace('_', '-')}={v}" for k, v in values.items())]
    words.append("--rendezvous=10.77.0.1:29400")
    for node, name in enumerate(names):
        logs.append(tmp_path / f"log-{node}")
        with open(logs[-1], "wb") as out:
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *COMMAND, *words, f"--node-rank={node}"],
                    cwd=place,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )
    try:
        reach(run, 60, processes[0], logs[0])
        if seconds:
            cable("down")
            time.sleep(seconds)
            cable("up")
        statuses = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [log.read_text() for log in logs]
    assert statuses == [0, 0], "\n".join(texts)[-6000:]
    assert "Machine 1 is done" in texts[1]
    events = read_events(run / "events.jsonl")
    starts = [e["step"] for e in events if e["type"] == "start"]
    assert seconds < 50 or (len(starts) > 1 and starts[1] > 0), texts
    alone = {**values, "nnodes": 1, "per_device_train_batch_size": 4, "output": f"like-{seconds}"}
    assert difference(run, several.good(alone, place)) < 1e-3
