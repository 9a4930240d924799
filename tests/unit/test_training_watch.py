"""Watchdogs: each planted fault is named, and normal runs are left alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from training_tiny import llama, rows, tokenizer

from finegraft.core.errors import TrainingError
from finegraft.core.schema import build
from finegraft.training import run as runs
from finegraft.training.report.read import Tail, summary
from finegraft.training.run import train
from finegraft.training.watch import FINDINGS


@pytest.fixture
def place(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(24)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes):
    values = {"model": "base", "data": "rows.jsonl", "output": "run", "max_length": 64}
    return build({**values, "max_steps": 32, "save_steps": 100, "report_rows": 0, **changes})


def findings(**changes):
    """Codes of the ``watch`` events of one run."""
    heard = []
    train(settings(**changes), listener=heard.append)
    return [event for event in heard if event["type"] == "watch"]


@pytest.fixture
def damaged(place, monkeypatch):
    """Make the trainer misbehave: ``damaged(function)`` is called with every trainer built."""

    def plant(function):
        task = runs.TASKS.get("causal")
        monkeypatch.setattr(
            runs.TASKS,
            "get",
            lambda name: type(task)(task.check, lambda *a: function(task.build(*a))),
        )

    return plant


@pytest.mark.parametrize("more", [{}, {"learning_rate": 1e-2}, {"method": "full"}, {"r": 2}])
def test_normal_runs_are_left_alone(place, more):
    assert findings(learning_rate=more.pop("learning_rate", 2e-3), **more) == []


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_reaches_the_weights(place, damaged):
    kept = {}

    def plant(trainer):
        kept["trainer"] = trainer
        stock = trainer.compute_loss

        def broken(*args, **kwargs):
            loss = stock(*args, **kwargs)
            return loss * math.nan if trainer.state.global_step == 3 else loss

        trainer.compute_loss = broken
        return trainer

    damaged(plant)
    with pytest.raises(TrainingError, match=r"(?s)FG-WATCH-001.*at step 4.*fix: +--learning-rate"):
        train(settings(max_steps=8, logging_steps=5, save_steps=2))
    trainer = kept["trainer"]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    run = place / "run"
    event = Tail(run / "events.jsonl").last("watch")[1]
    assert event["code"] == "FG-WATCH-001" and event["severity"] == "error"
    line = summary(run)
    assert (line.state, line.error) == ("failed", "FG-WATCH-001")
    assert "FG-WATCH-001" in (run / "report" / "index.html").read_text()
    assert [p.name for p in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (run / "adapter").exists()


def test_a_gradient_that_is_not_a_number_is_told_apart(damaged):
    def plant(trainer):
        weight = next(p for p in trainer.model.parameters() if p.requires_grad)
        weight.register_hook(lambda gradient: gradient * math.inf)
        return trainer

    damaged(plant)
    with pytest.raises(TrainingError, match=r"FG-WATCH-002.*step 1"):
        train(settings(max_steps=3))


def test_told_not_to_a_run_goes_on(damaged):
    def plant(trainer):
        stock = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: stock(*a, **k) * math.nan
        return trainer

    damaged(plant)
    heard = []
    result = train(settings(max_steps=3, stop_on_nan=False), listener=heard.append)
    told = [event for event in heard if event["type"] == "watch"]
    assert result.steps == 3
    assert {e["code"] for e in told} <= {"FG-WATCH-001", "FG-WATCH-002"} and told
    assert {e["severity"] for e in told} == {"warning"}
    assert math.isnan(heard[[e["type"] for e in heard].index("step")]["loss"])


def test_a_learning_rate_of_a_thousand_is_named(place):
    heard = []
    try:
        train(settings(learning_rate=1e3, max_steps=16), listener=heard.append)
    except TrainingError as error:
        assert error.code in ("FG-WATCH-001", "FG-WATCH-002")
    told = [event for event in heard if event["type"] == "watch"]
    assert told and "learning rate of 1000" in told[0]["cause"]
    assert "--learning-rate" in told[0]["cure"]


def test_a_loss_that_rises_is_divergence(place):
    told = findings(learning_rate=1.0, method="full", max_steps=16, warmup_steps=0)
    assert "FG-WATCH-003" in [event["code"] for event in told]


def test_a_learning_rate_of_almost_nothing_is_flat(place):
    told = findings(learning_rate=1e-12)
    assert [event["code"] for event in told] == ["FG-WATCH-004"]
    assert "1e-12" in told[0]["cause"]


def test_what_does_not_train_has_a_gradient_of_zero(damaged):
    def plant(trainer):
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)
            assert "lora" in name or not parameter.requires_grad
        return trainer

    damaged(plant)
    assert [event["code"] for event in findings(max_steps=4)] == ["FG-WATCH-005"]


def test_rows_learnt_by_heart_are_told(place):
    (place / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(2)))
    (place / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(9)[4:]))
    told = findings(
        data="few.jsonl",
        eval_data="held.jsonl",
        method="full",
        learning_rate=5e-2,
        eval_steps=8,
        max_steps=32,
    )
    assert "FG-WATCH-006" in [event["code"] for event in told]


def test_every_finding_has_a_cause_and_a_cure():
    assert sorted(FINDINGS) == [f"FG-WATCH-00{i}" for i in range(1, 7)]
    assert all(f.title and f.cause and f.cure for f in FINDINGS.values())
