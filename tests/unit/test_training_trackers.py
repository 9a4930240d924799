"""Trackers: none unasked, a missing one told before weights load, TensorBoard really written."""

from __future__ import annotations

import importlib.util
import json

import pytest
from training_tiny import llama, rows, tokenizer

from finegraft.core.errors import ConfigError
from finegraft.core.schema import build
from finegraft.training import trackers
from finegraft.training.run import train


@pytest.fixture
def place(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(12)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes):
    values = {"model": "base", "data": "rows.jsonl", "output": "run", "max_length": 64}
    return build({**values, "max_steps": 3, "report_rows": 0, **changes})


def test_names():
    assert trackers.names("none") == trackers.names("") == []
    assert trackers.names("tensorboard, wandb") == ["tensorboard", "wandb"]


def test_nothing_reports_unasked(place):
    result = train(settings())
    left = {path.name for path in place.iterdir()} | {path.name for path in result.run.iterdir()}
    assert not left & {"wandb", "mlruns", "tensorboard", "trackio"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", r"(?s)FG-RUN-021.*tensorbord.*allowed:.*wandb.*did you mean 'tensorboard'"),
        ("dvclive", r"(?s)FG-RUN-022.*dvclive.*not installed.*pip install dvclive"),
        ("none,azure_ml", r"FG-RUN-021.*'none'"),
        ("azure_ml", r"(?s)FG-RUN-022.*pip install azureml-core"),
    ],
)
def test_what_cannot_report_is_told_before_rows_are_read(tmp_path, name, said):
    config = build({"model": "demo", "data": str(tmp_path / "missing"), "report_to": name})
    with pytest.raises(ConfigError, match=said):
        train(config.model_copy(update={"output": str(tmp_path / "run")}))
    assert list(tmp_path.iterdir()) == []


def needs(package):
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


@needs("tensorboard")
def test_tensorboard_gets_the_numbers_in_the_run_folder(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard = []
    train(settings(report_to="tensorboard"), listener=heard.append)
    written = EventAccumulator(str(place / "run" / "tensorboard"))
    written.Reload()
    scalars = [(e.step, e.value) for e in written.Scalars("train/loss")]
    told = [(e["step"], e["loss"]) for e in heard if e["type"] == "step"]
    assert [s for s, _ in scalars] == [s for s, _ in told] == [1, 2, 3]
    assert [v for _, v in scalars] == pytest.approx([v for _, v in told], rel=1e-5)


@needs("wandb")
def test_wandb_writes_offline(place, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(place))
    train(settings(report_to="wandb"))
    import wandb

    wandb.finish()
    assert list((place / "wandb").glob("offline-run-*/run-*.wandb"))


@needs("mlflow")
def test_mlflow_writes_to_a_local_store(place, monkeypatch):
    import mlflow

    uri = (place / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(uri)
    train(settings(report_to="mlflow"))
    found = mlflow.tracking.MlflowClient(uri).search_runs(["0"])
    assert len(found) == 1 and found[0].data.metrics["loss"] > 0


@needs("trackio")
def test_trackio_keeps_its_data_on_the_disk(place, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(place / "trackio"))
    train(settings(report_to="trackio"))
    assert list((place / "trackio").rglob("*.db"))
