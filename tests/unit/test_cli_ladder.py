"""``finegraft ladder``: what is typed reaches the plan, and the result is shown as promised."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finegraft.cli.ladder import Bars
from finegraft.cli.main import app
from finegraft.core.schema import build
from finegraft.training import ladder as comparing

runner = CliRunner()
NEEDED = ["--model", "demo", "--data", "rows.jsonl"]
REFUSED = {"code": "FG-ADAPT-023", "found": "no biases here", "allowed": None, "fix": "lora"}


def rung(method, quality=None, error=None):
    keys = ("quality", "interval", "metrics", "trainable_parameters", "parameters", "seconds")
    if error:
        return {"method": method, "error": error, **dict.fromkeys(keys)}
    return {
        "method": method,
        "error": None,
        "quality": quality,
        "interval": [quality - 0.1, quality + 0.1],
        "metrics": {"perplexity": 2.0},
        "trainable_parameters": 0 if method == "base" else 12345,
        "parameters": 1_000_000,
        "seconds": 61.0,
        "peak_memory_bytes": 1.5e9,
        "adapter_bytes": 49380,
        "learning_rate": 1e-3,
    }


@pytest.fixture
def climbed(monkeypatch):
    """Stand in for planning and climbing; collects what was asked for."""
    seen = SimpleNamespace(rungs=[rung("base", 3.0), rung("lora", 1.0)], stop=False)

    def plan(values, methods=None, per_method=None):
        seen.values, seen.methods, seen.per_method = values, methods, per_method
        config = build({"output": "ladders/x", **values})
        names = methods or ["lora"]
        data = {"counts": {"rows": 400}}
        rungs = [None, *names]
        return SimpleNamespace(folder=Path(config.output), rungs=rungs, data=data, config=config)

    def climb(planned, *, listener=None):
        place = {"method": "lora", "number": 2, "of": 2, "ladder_seconds": 61.0}
        listener({"type": "rung", "how": "starting", **place})
        listener({"type": "phase", "name": "loading model", **place})
        step = {"step": 1, "total_steps": 7, "loss": 1.5, "eta_seconds": 30.0}
        listener({"type": "step", **step, **place})
        listener({"type": "notice", "message": "finishing this step", **place})
        if seen.stop:
            raise KeyboardInterrupt
        chosen = "lora" if seen.rungs[1]["error"] is None else None
        return {
            "ladder": str(planned.folder),
            "task": planned.config.task,
            "measure": "loss",
            "rungs": seen.rungs,
            "recommendation": {"method": chosen, "reason": "It is the best."},
        }

    monkeypatch.setattr(comparing, "plan", plan)
    monkeypatch.setattr(comparing, "climb", climb)
    return seen


def test_what_is_typed_reaches_the_plan(climbed, tmp_path):
    file = tmp_path / "ladder.yaml"
    file.write_text("model: demo\nmethods: [ia3]\nper_method: {dora: {r: 2, bias: all}}\nseed: 1\n")
    own = ["--method-set", "dora.r=8", "--method-set", "prompt.learning-rate=1e-1"]
    words = ["--data", "rows.jsonl", "--methods", "lora, dora,prompt", "--set", "seed=2"]
    done = runner.invoke(app, ["ladder", str(file), *words, *own, "--max-steps", "9"])
    assert done.exit_code == 0, done.output
    assert climbed.methods == ["lora", "dora", "prompt"]
    assert climbed.per_method == {"dora": {"r": 8, "bias": "all"}, "prompt": {"learning_rate": 0.1}}
    assert climbed.values == {"model": "demo", "data": "rows.jsonl", "seed": 2, "max_steps": 9}
    runner.invoke(app, ["ladder", str(file), "--data", "rows.jsonl"])
    assert climbed.methods == ["ia3"]
    runner.invoke(app, ["ladder", *NEEDED])
    assert climbed.methods is None


@pytest.mark.parametrize("text", ["r=8", "dora", "dora=3.5"])
def test_a_setting_without_its_method_is_refused(climbed, text):
    done = runner.invoke(app, ["ladder", *NEEDED, "--method-set", text, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "FG-LADDER-009"


def test_the_result_for_people(climbed):
    climbed.rungs.append(rung("bitfit", error=REFUSED))
    done = runner.invoke(app, ["ladder", *NEEDED, "--output", "my ladder"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("lora "))
    for cell in ("1.0000", "0.9000 to 1.1000", "12,345", "1.234%", "61 s", "1.5 GB", "49 kB"):
        assert cell in line
    assert "bitfit: FG-ADAPT-023: no biases here" in done.stdout
    assert "Recommended: lora. It is the best." in done.stdout
    assert "finegraft chat 'my ladder/lora'" in done.stdout
    assert "rung 2 of 2: lora, step 1/7, loss 1.5000, about 1:01 left in all" in done.stderr
    assert "1 methods, 3 epochs of 400 rows each" in done.stderr


def test_the_table_fits_a_narrow_terminal(climbed):
    done = runner.invoke(app, ["ladder", *NEEDED], env={"COLUMNS": "80"})
    head = next(line for line in done.stdout.splitlines() if line.startswith("method"))
    assert len(head.rstrip()) <= 80 and "interval" in head and "memory" in head


def test_a_classifier_is_asked_with_predict(climbed):
    done = runner.invoke(app, ["ladder", *NEEDED, "--task", "classification"])
    assert "finegraft predict ladders/x/lora" in done.stdout


def test_json_is_the_one_object(climbed):
    done = runner.invoke(app, ["ladder", *NEEDED, "--json"])
    found = json.loads(done.stdout)
    assert found["rungs"] == climbed.rungs and found["recommendation"]["method"] == "lora"


def test_a_stopped_ladder_says_how_to_go_on(climbed):
    climbed.stop = True
    done = runner.invoke(app, ["ladder", *NEEDED])
    assert done.exit_code == 130
    assert "Go on with:\n  finegraft ladder ladders/x/ladder.yaml\n" in done.stderr
    assert "finishing this step" in done.stderr


def test_when_no_method_was_trained_that_is_an_error(climbed):
    climbed.rungs = [rung("base", 3.0), rung("bitfit", error=REFUSED)]
    done = runner.invoke(app, ["ladder", *NEEDED])
    assert done.exit_code == 2 and "Recommended: none" in done.stdout
    assert "FG-LADDER-010: none of the 1 methods was trained" in done.stderr
    done = runner.invoke(app, ["ladder", *NEEDED, "--json"])
    assert done.exit_code == 2 and json.loads(done.stdout)["rungs"][1]["error"] == REFUSED


def test_bars_in_a_terminal(capsys):
    console = Console(force_terminal=True, width=100, record=True)
    shown = Bars(console)
    place = {"method": "dora", "number": 3, "of": 7, "ladder_seconds": 125.0}
    shown({"type": "rung", "how": "starting", **place})
    step = {"step": 4, "total_steps": 9, "loss": 0.5, "eta_seconds": 7.0}
    shown({"type": "step", **step, **place})
    console.print(shown.bars.make_tasks_table(shown.bars.tasks))
    text = console.export_text()
    assert "2/7" in text and "about 2:05 left" in text
    assert "4/9" in text and "loss 0.5000, 0:07 left" in text
