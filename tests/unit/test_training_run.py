"""A run's folder: what it holds, what it says, and that it resumes from anywhere."""

from __future__ import annotations

import json

import pytest
from training_tiny import llama, rows, tokenizer

from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.core.schema import build, from_file
from finegraft.training import plot
from finegraft.training.events import by_step, read_events
from finegraft.training.run import train


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model and rows, and we are in it."""
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(20)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes):
    values = {"model": "base", "data": "rows.jsonl", "output": "run", "max_length": 64}
    return build({**values, "max_steps": 4, "save_steps": 2, **changes})


def test_the_folder_holds_everything(place):
    heard = []
    result = train(settings(eval_fraction=0.2), listener=heard.append)
    run = place / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "data.json",
        "events.jsonl",
        "adapter",
        "checkpoints",
        "report",
    }
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_events(run / "events.jsonl") == heard
    kinds = [event["type"] for event in heard]
    assert kinds.count("step") == 4 and kinds[-1] == "end" and "eval" in kinds
    data = json.loads((run / "data.json").read_text())
    assert data["counts"]["rows"] == 16 and len(data["fingerprint"]) == 64
    assert result.steps == 4 and result.tokens == heard[-1]["tokens"] > 0
    assert result.eval_loss is not None and not result.interrupted


def test_paths_in_the_saved_configuration_work_from_any_folder(place, monkeypatch):
    train(settings())
    saved = from_file(place / "run" / "config.yaml")
    assert saved.data == str(place / "rows.jsonl") and saved.model == str(place / "base")
    monkeypatch.chdir("/")
    again = train(saved.model_copy(update={"output": str(place / "second")}))
    assert again.steps == 4


def test_full_finetuning_saves_a_model_that_is_found_again(place):
    result = train(settings(full_finetuning=True, learning_rate=1e-3))
    assert (place / "run" / "model" / "config.json").is_file()
    assert not (place / "run" / "adapter").exists()
    assert train(settings(model="run", output="next", max_steps=1)).steps == 1
    assert result.adapter == result.run / "model"


def test_a_second_run_in_one_folder_needs_overwrite(place):
    train(settings(max_steps=1))
    with pytest.raises(ConfigError, match=r"(?s)FG-RUN-002.*finegraft resume.*--overwrite"):
        train(settings(max_steps=1))
    assert train(settings(max_steps=2, overwrite=True)).steps == 2


def test_a_curve_shows_each_step_once(tmp_path):
    events = [{"type": "step", "step": s, "loss": v} for s, v in ((1, 3.0), (2, 9.0), (2, 2.0))]
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"type": "st')
    assert [e["loss"] for e in by_step(read_events(file), "step")] == [3.0, 2.0]
    assert plot.loss_curve(file, tmp_path / "loss.png")
    file.write_text("")
    assert not plot.loss_curve(file, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "lorra"}, "FG-ADAPT-010.*lorra"),
        ({"method": "ia3", "r": 8}, "FG-CONF-006.*r with method 'ia3'"),
        ({"bnb_4bit_quant_type": "fp4"}, "FG-MODEL-016.*bnb_4bit_quant_type"),
    ],
)
def test_settings_that_fit_no_method_are_told_before_rows_are_read(tmp_path, wrong, said):
    config = build({"model": "demo", "data": str(tmp_path / "missing"), **wrong})
    with pytest.raises(FinegraftError, match=said):
        train(config.model_copy(update={"output": str(tmp_path / "run")}))
    assert list(tmp_path.iterdir()) == []
