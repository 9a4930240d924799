"""Where a Ray job keeps its checkpoints: what is whole there, what is fetched, what is refused."""

from __future__ import annotations

import json
import re
import uuid

import fsspec
import pytest
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.errors import ConfigError, StorageError
from finegraft.core.schema import build
from finegraft.training import checkpoint, manifest, ray_job
from finegraft.training.ray_storage import LATEST, Store

runner = CliRunner()


def make_run(folder, *steps, words="x"):
    """A run folder as training leaves it, with whole checkpoints."""
    for step in steps:
        inner = folder / "checkpoints" / f"checkpoint-{step}"
        (inner / "deep").mkdir(parents=True, exist_ok=True)
        (inner / "weights").write_text(words * step)
        (inner / "deep" / "state").write_text(str(step))
        manifest.write(inner, {"step": step})
    (folder / "config.yaml").write_text("model: demo\n")
    (folder / "data.json").write_text("{}\n")
    (folder / "events.jsonl").write_text('{"type": "start"}\n')
    return folder


@pytest.fixture(params=["memory", "file", "plain"])
def address(request, tmp_path):
    kinds = {"memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/far"}
    return kinds.get(request.param, str(tmp_path / "far"))


def test_a_checkpoint_comes_back_as_it_was(address, tmp_path):
    run = make_run(tmp_path / "a", 3)
    store = Store(address, "a")
    assert store.latest() is None
    store.require_writable()
    store.keep(run, 3, keep=2)
    latest = Store(address, "a").latest()
    assert (latest["step"], latest["done"]) == (3, False)
    told, back = [], tmp_path / "b"
    assert Store(address, "a").fetch(back, told.append)
    assert told == [f"fetched the run from {store.address}"]
    for file in run.rglob("*"):
        if file.is_file():
            assert (back / file.relative_to(run)).read_bytes() == file.read_bytes()
    found, damaged = checkpoint.newest(back / "checkpoints")
    assert checkpoint.step_of(found) == 3 and damaged == {}
    assert not list(tmp_path.glob(".*"))


def test_old_checkpoints_go_and_the_trained_model_takes_their_place(address, tmp_path):
    run = make_run(tmp_path / "a", 2, 9, 10)
    store = Store(address, "a")
    for step in (2, 9, 10):
        store.keep(run, step, keep=2)
    names = store.files.ls(f"{store.root}/checkpoints", detail=False)
    assert sorted(name.rsplit("/", 1)[-1] for name in names) == ["checkpoint-10", "checkpoint-9"]
    (run / "adapter").mkdir()
    (run / "adapter" / "weights").write_text("trained")
    store.finish(run)
    latest = store.latest()
    assert latest["done"] and "adapter/weights" in latest["files"]
    assert not any(name.startswith("checkpoints") for name in latest["files"])
    assert store.files.cat_file(f"{store.root}/adapter/weights") == b"trained"
    store.files.invalidate_cache()
    assert not store.files.exists(f"{store.root}/checkpoints/checkpoint-10")
    assert store.fetch(tmp_path / "b", print)
    assert (tmp_path / "b" / "adapter" / "weights").read_text() == "trained"


def test_a_checkpoint_that_is_as_new_here_is_not_fetched(address, tmp_path):
    store = Store(address, "a")
    store.keep(make_run(tmp_path / "a", 3), 3, keep=2)
    here = make_run(tmp_path / "here", 3, 5, words="y")
    assert store.fetch(here, print)
    assert (here / "checkpoints" / "checkpoint-5" / "weights").read_text() == "y" * 5
    older = make_run(tmp_path / "older", 2, words="y")
    assert store.fetch(older, lambda words: None)
    assert (older / "checkpoints" / "checkpoint-3" / "weights").read_text() == "xxx"
    assert not Store(address, "nothing").fetch(tmp_path / "none", print)


def test_a_transfer_that_was_cut_is_no_checkpoint(address, tmp_path):
    run = make_run(tmp_path / "a", 3, 6)
    store = Store(address, "a")
    store.keep(run, 3, keep=2)
    file = f"{store.root}/checkpoints/checkpoint-6/weights"
    store.files.makedirs(file.rsplit("/", 1)[0], exist_ok=True)
    store.files.pipe_file(file, b"xx")  # and then the machine was lost
    assert store.fetch(tmp_path / "b", print)
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["checkpoint-3"]
    store.files.pipe_file(f"{store.root}/checkpoints/checkpoint-3/weights", b"x")
    with pytest.raises(StorageError, match=r"FG-RAY-004: .*weights has 1 bytes and not 3"):
        store.fetch(tmp_path / "c", print)
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".*"))


def test_what_lies_there_can_be_removed(address, tmp_path):
    store = Store(address, "a")
    store.clear()
    store.keep(make_run(tmp_path / "a", 3), 3, keep=2)
    store.clear()
    store.files.invalidate_cache()
    assert store.latest() is None


def test_a_place_that_cannot_be_used(tmp_path):
    with pytest.raises(StorageError, match=r"FG-RAY-003: the storage nosuch://x/a cannot be used"):
        Store("nosuch://x", "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="FG-RAY-003"):
        Store(f"{tmp_path}/file", "a").require_writable()


# --- what is checked before Ray is asked ------------------------------------------------------


def config(**changes):
    return build({"model": "demo", "data": "rows.jsonl", "output": "runs/a", **changes})


def test_without_ray_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"FG-RAY-001[\s\S]*finegraft\[ray\]"):
        ray_job.train(config())
    words = ["train", "--model", "demo", "--data", "rows.jsonl", "--ray", "local", "--json"]
    done = runner.invoke(app, words)
    assert done.exit_code == 2 and json.loads(done.stdout)["error"]["code"] == "FG-RAY-001"


def test_a_storage_without_ray_is_refused():
    words = ["train", "--model", "demo", "--data", "rows.jsonl", "--storage", "s3://x"]
    done = runner.invoke(app, words)
    assert done.exit_code == 2 and "FG-RAY-009: --storage s3://x without --ray" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "ray://127.0.0.1:9", "nonsense"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address):
    with pytest.raises(
        ConfigError, match=re.escape(f"FG-RAY-002: Ray at '{address}' does not answer")
    ):
        ray_job._require_answer(address)


def test_machines_are_the_clusters_business():
    with pytest.raises(ConfigError, match="FG-RAY-008: --ray with nnodes 2"):
        ray_job._require_possible(config(nnodes=2))


def test_a_finished_run_in_the_storage_is_not_overwritten(tmp_path):
    address = f"memory://{uuid.uuid4().hex}"
    store = Store(address, "a")
    run = make_run(tmp_path / "a", 3)
    store.keep(run, 3, keep=1)
    assert ray_job._store(config(), address).latest()["step"] == 3  # it is gone on with
    store.finish(run)
    with pytest.raises(ConfigError, match=r"FG-RAY-006: memory://.*/a holds a finished run"):
        ray_job._store(config(), address)
    assert ray_job._store(config(overwrite=True), address).latest() is None
    assert not fsspec.filesystem("memory").exists(f"{store.root}/{LATEST}")


def test_workers_that_are_lost_for_good():
    with pytest.raises(ray_job.TrainingError, match=r"FG-RAY-007: .*than 2 times: the last line"):
        ray_job._outcome([RuntimeError("first\nthe last line\n")], 2, config())
    found = {"result": {}}
    assert ray_job._outcome([found], 2, config()) is found


def test_errors_of_a_run_are_those_without_ray():
    values = {"kind": "DataError", "code": "FG-DATA-001", "found": "f", "allowed": None, "fix": "x"}
    error = ray_job._error(values)
    assert type(error).__name__ == "DataError" and str(error).startswith("FG-DATA-001: f")
