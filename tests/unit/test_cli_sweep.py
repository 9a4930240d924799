"""``finegraft sweep``: what is typed reaches the plan, and the result is shown as promised."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.cli.sweep import _Bars
from finegraft.training.sweep import planning, running, space

runner = CliRunner()
NEEDED = ["--model", "demo", "--data", "rows.jsonl"]
REFUSED = {"code": "FG-WATCH-001", "found": "the loss is nan", "allowed": None, "fix": "less"}


def row(name, loss, values, **more):
    common = {"name": name, "values": values, "state": "finished", "loss": loss}
    common |= {"eval_loss": loss, "train_loss": loss, "steps": 7, "total_steps": 7, "seconds": 61.0}
    return {**common, "error": None, "metrics": None, "run": f"sweeps/x/{name}", **more}


@pytest.fixture
def swept(monkeypatch):
    """Stand in for planning and running; collects what was asked for."""
    values = {"r": 8, "learning_rate": 1e-4}
    seen = SimpleNamespace(runs=[row("a", 1.25, values)], stop=False)

    def plan(values, vary, *, searching="grid", trials=None):
        seen.values, seen.vary, seen.searching, seen.trials = values, vary, searching, trials
        axes = tuple(space.axes(vary))
        data = {"counts": {"rows": 400}}
        folder = Path(values.get("output", "sweeps/x"))
        return SimpleNamespace(folder=folder, space=axes, data=data, held_out=True, count=6)

    def sweep(planned, *, listener=None):
        place = {"method": "r=8", "number": 2, "of": 6, "ladder_seconds": 61.0}
        listener({"type": "rung", "how": "starting", **place})
        step = {"step": 1, "total_steps": 7, "loss": 1.5, "eta_seconds": 30.0}
        listener({"type": "step", **step, **place})
        if seen.stop:
            raise KeyboardInterrupt
        for one in seen.runs:
            listener({"type": "result", "row": one, "best": seen.runs[0], **place})
        best = seen.runs[0] if seen.runs[0]["loss"] is not None else None
        return {
            "sweep": str(planned.folder),
            "task": planned_task(seen),
            "measure": "eval_loss",
            "varied": dict.fromkeys(seen.runs[0]["values"]),
            "runs": seen.runs,
            "best": best,
            "notes": ["The best r (8) is the greatest that was tried."],
        }

    monkeypatch.setattr(planning, "plan", plan)
    monkeypatch.setattr(running, "sweep", sweep)
    return seen


def planned_task(seen):
    return seen.values.get("task", "causal")


def test_what_is_typed_reaches_the_plan(swept, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: demo\nsweep: {r: [8, 16], seed: [1, 2]}\nsearch: optuna\ntrials: 7\nlora_alpha: 4\n"
    )
    words = ["--data", "rows.jsonl", "--set", "learning-rate=1e-4..1e-3", "--set", "seed=3"]
    done = runner.invoke(app, ["sweep", str(file), *words, "--max-steps", "9"])
    assert done.exit_code == 0, done.output
    assert swept.vary == {"r": [8, 16], "seed": "3", "learning_rate": "1e-4..1e-3"}
    shared = {"model": "demo", "lora_alpha": 4, "data": "rows.jsonl", "max_steps": 9}
    assert swept.values == shared
    assert (swept.searching, swept.trials) == ("optuna", 7)
    runner.invoke(app, ["sweep", str(file), *words, "--search", "grid", "--trials", "2"])
    assert (swept.searching, swept.trials) == ("grid", 2)
    runner.invoke(app, ["sweep", *NEEDED, "--set", "r=8,16"])
    assert (swept.searching, swept.trials) == ("grid", None)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--set", "r"], "FG-SWEEP-010"),
        (["--set", "=8"], "FG-SWEEP-010"),
        (["--set", "r="], "FG-SWEEP-010"),
        (["--set", "r=8,16", "--r", "4"], "FG-SWEEP-011"),
    ],
)
def test_mistakes_in_what_is_varied(swept, words, code):
    done = runner.invoke(app, ["sweep", *NEEDED, *words, "--json"])
    assert done.exit_code == 2 and json.loads(done.stdout)["error"]["code"] == code


def test_a_file_whose_sweep_is_no_mapping(swept, tmp_path):
    (tmp_path / "x.yaml").write_text("sweep: [r, 8]\n")
    done = runner.invoke(app, ["sweep", str(tmp_path / "x.yaml"), *NEEDED])
    assert done.exit_code == 2 and "FG-SWEEP-010: sweep: ['r', 8]" in done.stderr


TYPED = ["sweep", *NEEDED, "--set", "r=4,8", "--set", "learning_rate=1e-4,3e-4"]


def test_the_result_for_people(swept):
    values = {"r": 4, "learning_rate": 3e-4}
    swept.runs += [
        row("b", None, values, state="pruned", steps=3),
        row("c", None, values, state="failed", error=REFUSED, steps=None, seconds=None),
    ]
    done = runner.invoke(app, [*TYPED, "--output", "my sweep"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("8 "))
    for cell in ("0.0001", "1.2500", "7", "1:01", "finished"):
        assert cell in line
    assert "r=4, learning_rate=0.0003: FG-WATCH-001: the loss is nan" in done.stdout
    assert "Best: r=8, learning_rate=0.0001, held-out loss 1.2500" in done.stdout
    assert "greatest that was tried" in done.stdout
    assert "my sweep/index.html" in done.stdout and "finegraft chat sweeps/x/a" in done.stdout
    said = done.stderr
    assert "6 runs of 400 rows, varying r, learning_rate, in my sweep" in said
    assert "run 2 of 6: r=8: held-out loss 1.2500 in 1:01, the best so far; about 1:01 left" in said
    assert "stopped early at step 3 of 7" in said and "FG-WATCH-001: the loss is nan" in said


def test_the_table_fits_a_narrow_terminal(swept):
    done = runner.invoke(app, TYPED, env={"COLUMNS": "60"})
    table = done.stdout.split("\n\n")[0].splitlines()
    assert all(len(line.rstrip()) <= 60 for line in table) and "1.2500" in done.stdout


def test_a_classifier_is_asked_with_predict(swept):
    done = runner.invoke(app, [*TYPED, "--task", "classification"])
    assert 'finegraft predict sweeps/x/a "your text"' in done.stdout


def test_json_is_the_one_object(swept):
    found = json.loads(runner.invoke(app, [*TYPED, "--json"]).stdout)
    assert found["runs"] == swept.runs and found["best"]["name"] == "a"


def test_a_stopped_sweep_says_how_to_go_on(swept):
    swept.stop = True
    done = runner.invoke(app, TYPED)
    assert done.exit_code == 130
    assert "Go on with:\n  finegraft sweep sweeps/x/sweep.yaml\n" in done.stderr


def test_when_no_run_came_to_its_end_that_is_an_error(swept):
    swept.runs = [row("a", None, {"r": 8, "learning_rate": 1}, state="failed", error=REFUSED)]
    done = runner.invoke(app, TYPED)
    assert done.exit_code == 2
    assert "FG-SWEEP-012: none of the 6 runs was trained" in done.stderr


def test_bars_in_a_terminal():
    console = Console(force_terminal=True, width=100, record=True)
    shown = _Bars(console)
    place = {"method": "r=8", "number": 3, "of": 7, "ladder_seconds": 125.0}
    shown({"type": "rung", "how": "starting", **place})
    step = {"step": 4, "total_steps": 9, "loss": 0.5, "eta_seconds": 7.0}
    shown({"type": "step", **step, **place})
    console.print(shown.bars.make_tasks_table(shown.bars.tasks))
    text = console.export_text()
    assert "sweep" in text and "run 3 of 7: r=8" in text and "2/7" in text and "4/9" in text
