"""The quickstart composes: its rows, its before and after, its folders and its keys."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from finegraft.cli import quickstart
from finegraft.cli.main import app
from finegraft.data.sources import read_rows

runner = CliRunner()


class Model:
    """Knows whether its adapter is on."""

    adapter = True

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapter = False
        yield
        self.adapter = True


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stand-ins for training and for the exam; where each run went, with its configuration."""
    monkeypatch.chdir(tmp_path)
    seen = SimpleNamespace(configs=[], interrupted=False)

    def run_training(out, config, *, resume=False):
        seen.configs.append(config)
        folder = tmp_path / config.output
        folder.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(
            run=config.output,
            steps=2,
            total_steps=126,
            loss=0.5,
            eval_loss=None,
            seconds=1.5,
            tokens=10,
            interrupted=seen.interrupted,
            adapter=None,
            model=Model(),
            tokenizer="tokenizer",
        )

    def examine(model, tokenizer, heldout):
        if model.adapter:
            return quickstart.Exam([row["completion"] for row in heldout], 0.75, 0.25)
        return quickstart.Exam(["rambling"] * len(heldout), 0.0, 2.5)

    monkeypatch.setattr(quickstart, "run_training", run_training)
    monkeypatch.setattr(quickstart, "examine", examine)
    return seen


def test_json_has_exactly_the_promised_keys(runs):
    done = runner.invoke(app, ["quickstart", "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values.pop("seconds") > 0
    assert values == {
        "exact_match_before": 0.0,
        "exact_match_after": 0.75,
        "heldout_loss_before": 2.5,
        "heldout_loss_after": 0.25,
        "training_seconds": 1.5,
        "run": "runs/quickstart",
    }


def test_rows_are_on_the_disk_and_held_out_rows_are_not_trained_on(runs, tmp_path):
    runner.invoke(app, ["quickstart"])
    config = runs.configs[0]
    train, heldout = read_rows(config.data), read_rows(tmp_path / "runs/data/yoda-heldout.jsonl")
    assert len(train) == 660 and len(heldout) == 60
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert config.model == "demo" and config.max_length == quickstart.MAX_LENGTH
    kept = json.loads((tmp_path / "runs/quickstart/report/quickstart.json").read_text())
    assert len(kept["answers"]) == 60
    assert kept["answers"][0]["before"] == "rambling"


def test_people_see_examples_scores_and_three_commands(runs):
    done = runner.invoke(app, ["quickstart"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("rambling") == quickstart.EXAMPLES
    kinds = {row.split("│")[1].split()[0] for row in done.stdout.splitlines() if "rambling" in row}
    assert len(kinds) > 1, "examples of one pattern only"
    for words in ("0%", "75%", "2.500", "0.250"):
        assert words in done.stdout
    commands = [line for line in done.stdout.splitlines() if line.startswith("  finegraft ")]
    assert [c.split()[1] for c in commands] == ["chat", "generate", "train"]


def test_a_second_run_goes_beside_the_first_unless_told_otherwise(runs):
    for words in ([], [], ["--overwrite"], ["--fresh"]):
        runner.invoke(app, ["quickstart", *words])
    outputs = [(config.output, config.overwrite) for config in runs.configs]
    first, second = "runs/quickstart", "runs/quickstart-2"
    assert outputs == [(first, False), (second, False), (first, True), (first, True)]


def test_steps_are_handed_on(runs):
    runner.invoke(app, ["quickstart", "--steps", "4"])
    assert runs.configs[0].max_steps == 4


def test_a_stopped_quickstart_says_how_to_go_on(runs, monkeypatch):
    runs.interrupted = True
    monkeypatch.setattr(quickstart, "examine", lambda *_: pytest.fail("it was examined"))
    done = runner.invoke(app, ["quickstart"])
    assert done.exit_code == 130
    assert "finegraft resume runs/quickstart" in done.stdout
