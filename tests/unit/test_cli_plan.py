"""``finegraft plan`` and ``train --fit``: what is printed, promised and chosen."""

from __future__ import annotations

import json

import pytest
from training_tiny import llama, rows, tokenizer
from typer.testing import CliRunner

from finegraft.cli import main
from finegraft.core.schema import from_file
from finegraft.training.plan import forecast

PROMISED = {"peak_memory_bytes", "parts", "seconds", "disk_bytes", "fits"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(24)))
    monkeypatch.chdir(tmp_path)
    for module in ("plan", "train"):  # a test's process must stay as it was
        monkeypatch.setattr(f"finegraft.cli.{module}.keep_freed_memory", lambda: None)
    return tmp_path


BASE = ["--model", "base", "--data", "rows.jsonl", "--max-length", "64", "--output", "run"]
BASE += ["--max-steps", "6", "--dtype", "float32"]


def run(*words):
    done = CliRunner().invoke(main.app, [*map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_json_has_what_is_promised_and_nothing_is_left_behind(place):
    done = run("plan", *BASE, "--json")
    values = json.loads(done.stdout)
    assert set(values) >= PROMISED
    assert values["fits"] is True and values["probed"] is False and values["steps"] == 6
    assert values["peak_memory_bytes"] == sum(values["parts"].values())
    assert values["seconds"] > 0 and values["disk_bytes"] > 0
    assert not (place / "run").exists()


def test_a_person_sees_parts_and_sums(place):
    shown = run("plan", *BASE).stdout
    for words in ("activations", "optimizer", "peak memory", "6 steps", "disk:", "It fits."):
        assert words in shown
    assert "--probe takes five real steps" in shown


def test_probe_takes_real_steps_and_leaves_nothing(place):
    values = json.loads(run("plan", *BASE, "--probe", "--json").stdout)
    assert values["probed"] is True and values["steps"] == 6
    plain = json.loads(run("plan", *BASE, "--json").stdout)
    assert values["seconds"] != plain["seconds"]
    assert not (place / "run").exists()


def small_machine(monkeypatch, share):
    """Less memory than the run would take, by a factor."""
    whole = json.loads(run("plan", *BASE, "--json").stdout)
    kept = whole["parts"]["activations"]
    there = (whole["peak_memory_bytes"] - share * kept) / forecast.MARGIN
    monkeypatch.setattr(forecast, "available_bytes", lambda: int(there) - forecast.resident_bytes())
    monkeypatch.setattr(forecast, "_as_recomputed", lambda config, model, work, made: made)


def test_what_would_fit_is_a_command(place, monkeypatch):
    monkeypatch.setattr(forecast, "resident_bytes", lambda: 0)
    small_machine(monkeypatch, 0.2)
    shown = run("plan", *BASE)
    assert "It does not fit." in shown.stdout and "rows a step" in shown.stdout
    values = json.loads(run("plan", *BASE, "--json").stdout)
    assert values["fits"] is False
    words = values["command"].split()
    assert words[:2] == ["finegraft", "train"] and "--per-device-train-batch-size" in words
    assert values["fitting"]["per_device_train_batch_size"] < 8
    again = json.loads(run("plan", *words[2:], "--json").stdout)
    assert again["fits"] is True


def test_fit_trains_what_it_chose_and_keeps_it(place, monkeypatch):
    monkeypatch.setattr(forecast, "resident_bytes", lambda: 0)
    small_machine(monkeypatch, 0.2)
    done = run("train", *BASE, "--fit", "--report-rows", 0)
    assert done.exit_code == 0 and "--fit: --per-device-train-batch-size" in done.stderr
    saved = from_file(place / "run" / "config.yaml")
    assert saved.per_device_train_batch_size < 8
    assert saved.per_device_train_batch_size * saved.gradient_accumulation_steps == 8


def test_mistakes_are_those_of_train(place):
    done = run("plan", "--model", "base", "--data", "nothing.jsonl")
    assert done.exit_code == 2 and "FG-DATA" in done.stderr
    done = run("plan", *BASE, "--method", "lorra")
    assert done.exit_code == 2 and "FG-ADAPT-010" in done.stderr
