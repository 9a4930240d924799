"""Training as a Ray job: the same numbers, lost workers, and checkpoints in an object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from command_line import environment, write_rows
from safetensors.torch import load_file

pytest.importorskip("ray", reason="needs pip install 'finegraft[ray]'")

SETTINGS = """
data: rows.jsonl
eval_fraction: 0.2
max_length: 64
max_steps: {steps}
per_device_train_batch_size: 4
save_steps: {save}
warmup_steps: 0
dtype: float32
report_rows: 0
data_check: false
"""
WAIT_SECONDS = 180
FINEGRAFT = [sys.executable, "-m", "finegraft.cli.main"]
CLOUD = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture
def place(base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 30)
    text = f"model: {base}\n" + SETTINGS.format(steps=12, save=5)
    (tmp_path / "short.yaml").write_text(text)
    text = f"model: {base}\n" + SETTINGS.format(steps=300, save=20)
    (tmp_path / "long.yaml").write_text(text)
    return tmp_path


def finegraft(*words, cwd, **env):
    return subprocess.run(
        [*FINEGRAFT, *map(str, words)],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )


def lines(file):
    if not file.is_file():
        return []
    whole = file.read_text()
    return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]


def losses(file):
    """The last told loss of each step."""
    return {e["step"]: e["loss"] for e in lines(file) if e["type"] == "step"}


def starts(file):
    return [e["step"] for e in lines(file) if e["type"] == "start"]


def started(place, said, *words, **env):
    with open(place / said, "w") as out:
        return subprocess.Popen(
            [*FINEGRAFT, *map(str, words)],
            cwd=place,
            env=environment(**env),
            stdout=out,
            stderr=out,
        )


def wait_for_step(process, events, step, said):
    until = time.monotonic() + WAIT_SECONDS
    while max(losses(events), default=0) < step:
        assert process.poll() is None and time.monotonic() < until, said.read_text()
        time.sleep(0.02)


def worker_of(events):
    return [e["process"]["pid"] for e in lines(events) if e["type"] == "run"][-1]


def same_adapter(one, other, atol=0.0):
    first, second = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)
    )
    assert first.keys() == second.keys()
    assert all(first[name].allclose(second[name], rtol=0, atol=atol) for name in first)


def test_a_ray_job_is_the_run_without_ray(place):
    whole = finegraft("train", "short.yaml", "--output", "plain", "--json", cwd=place)
    assert whole.returncode == 0, whole.stderr
    done = finegraft(
        "train", "short.yaml", "--output", "ray", "--ray", "local", "--json", cwd=place
    )
    assert done.returncode == 0, done.stderr
    found, plain = json.loads(done.stdout), json.loads(whole.stdout)
    assert {k: found[k] for k in ("steps", "loss", "eval_loss", "tokens")} == {
        k: plain[k] for k in ("steps", "loss", "eval_loss", "tokens")
    }
    assert (found["run"], found["adapter"]) == ("ray", "ray/adapter")
    assert losses(place / "ray" / "events.jsonl") == losses(place / "plain" / "events.jsonl")
    same_adapter(place / "ray", place / "plain")
    assert "step 12/12" in done.stderr and not (place / "ray" / ".ray-job").exists()
    # a mistake of the run is told as without Ray, at once
    again = finegraft("train", "short.yaml", "--output", "ray", "--ray", "local", cwd=place)
    assert again.returncode == 2 and "FG-RUN-002" in again.stderr
    nobody = finegraft("train", "short.yaml", "--ray", "127.0.0.1:9", "--output", "x", cwd=place)
    assert nobody.returncode == 2 and "FG-RAY-002" in nobody.stderr


def test_a_killed_worker_goes_on_from_its_last_checkpoint(place):
    process = started(place, "said", "train", "long.yaml", "--output", "ray", "--ray", "local")
    events = place / "ray" / "events.jsonl"
    try:
        wait_for_step(process, events, 45, place / "said")
        os.kill(worker_of(events), signal.SIGKILL)
        assert process.wait(timeout=WAIT_SECONDS) == 0, (place / "said").read_text()
    finally:
        process.kill()
    assert len(starts(events)) == 2 and starts(events)[1] >= 40
    whole = finegraft("train", "long.yaml", "--output", "plain", cwd=place)
    assert whole.returncode == 0, whole.stderr
    assert losses(events) == losses(place / "plain" / "events.jsonl")
    same_adapter(place / "ray", place / "plain")


@pytest.fixture
def cloud():
    """An S3 server on the loopback interface."""
    pytest.importorskip("moto", reason="needs pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 60
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.2)
        files = s3fs.S3FileSystem(
            key="testing",
            secret="testing",
            endpoint_url=address,
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        files.mkdir("runs")
        yield {"AWS_ENDPOINT_URL": address, **CLOUD}, files
    finally:
        server.kill()
        server.wait()


def test_a_lost_machine_is_replaced_from_an_object_store(place, cloud):
    env, files = cloud
    words = ["train", "long.yaml", "--output", "ray", "--ray", "local", "--storage", "s3://runs/a"]
    process = started(place, "said", *words, **env)
    events = place / "ray" / "events.jsonl"
    try:
        wait_for_step(process, events, 45, place / "said")
        pid = worker_of(events)
        os.kill(pid, signal.SIGSTOP)  # nothing is written between the two
        shutil.rmtree(place / "ray")
        os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=WAIT_SECONDS) == 0, (place / "said").read_text()
    finally:
        process.kill()
    assert (
        starts(events)[-1] in (20, 40)
        and "fetched the run from s3://runs/a/ray" in (place / "said").read_text()
    )
    whole = finegraft("train", "long.yaml", "--output", "plain", cwd=place)
    assert whole.returncode == 0, whole.stderr
    same_adapter(place / "ray", place / "plain")
    latest = json.loads(files.cat("runs/a/ray/latest.json"))
    assert latest["done"] and "adapter/adapter_model.safetensors" in latest["files"]
    found = files.cat("runs/a/ray/adapter/adapter_model.safetensors")
    assert found == (place / "plain" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert not files.exists("runs/a/ray/checkpoints")
    assert [name for name in files.ls("runs/a", detail=False) if ".ray" in name] == []
    again = finegraft(*words, "--output", "ray", cwd=place, **env)
    assert again.returncode == 2 and "FG-RAY-006" in again.stderr


@pytest.mark.slow
def test_two_workers_are_the_two_processes_of_a_launch(place):
    words = ["train", "short.yaml", "--nproc", 2, "--json", "--output"]
    plain, ray = (
        finegraft(*words, "plain", cwd=place),
        finegraft(*words, "ray", "--ray", "local", cwd=place),
    )
    assert plain.returncode == ray.returncode == 0, ray.stderr
    assert json.loads(ray.stdout)["loss"] == json.loads(plain.stdout)["loss"]
    assert losses(place / "ray" / "events.jsonl") == losses(place / "plain" / "events.jsonl")
    # another process group: sums of gradients may differ in the last bits
    same_adapter(place / "ray", place / "plain", atol=1e-6)


@pytest.mark.slow
def test_a_worker_that_is_lost_too_often_is_told(place):
    words = ["train", "long.yaml", "--output", "ray", "--ray", "local", "--max-restarts", 0]
    process = started(place, "said", *words)
    events = place / "ray" / "events.jsonl"
    try:
        wait_for_step(process, events, 25, place / "said")
        os.kill(worker_of(events), signal.SIGKILL)
        assert process.wait(timeout=WAIT_SECONDS) == 2
    finally:
        process.kill()
    said = (place / "said").read_text()
    assert "FG-RAY-007" in said and "finegraft resume" in said and "Traceback" not in said
    done = finegraft("resume", "ray", "--json", cwd=place)
    assert json.loads(done.stdout)["steps"] == 300
