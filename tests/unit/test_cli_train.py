"""Flags come from the schema and win in the right order; endings are the promised ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from finegraft.cli import launch
from finegraft.cli import train as command
from finegraft.cli.flags import _without_none
from finegraft.cli.main import app
from finegraft.core.errors import DataError
from finegraft.core.schema import TrainConfig, build
from finegraft.training import run as training_run

runner = CliRunner()
NEEDED = ["--model", "demo", "--data", "rows.jsonl"]


@pytest.fixture
def trained(monkeypatch):
    """Stand in for training; collects the calls and answers with ``result``."""
    seen = SimpleNamespace(config=None, resume=None, interrupted=False)

    def train(config, *, listener=None, resume=False):
        seen.config, seen.resume = config, resume
        print("a library that prints")
        listener({"type": "phase", "name": "training", "time": 0.0})
        done = 3 if seen.interrupted else 7
        return SimpleNamespace(
            run=Path(config.output),
            adapter=None if seen.interrupted else Path(config.output) / "adapter",
            steps=done,
            total_steps=7,
            loss=1.25,
            eval_loss=float("nan"),
            seconds=61.0,
            tokens=1234,
            interrupted=seen.interrupted,
            model=None,
            tokenizer=None,
        )

    def launched(out, config, machines, *, resume=False):
        return train(config, listener=lambda event: None, resume=resume)

    monkeypatch.setattr(training_run, "train", train)
    monkeypatch.setattr(launch, "run_launched", launched)
    monkeypatch.setattr(launch, "require_possible", lambda *_: None)
    monkeypatch.setattr(command, "_require_there", lambda _: None)
    return seen


def sample(name, info):
    """Words for a field's flag, and the value that must come of them."""
    kind = _without_none(info.annotation)
    if name in ("target_modules", "modules_to_save"):
        return ["q_proj, v_proj"], ["q_proj", "v_proj"]
    if name in ("data", "eval_data"):
        return ["some.jsonl"], "some.jsonl"
    if name == "new_tokens":
        return ["<order>"], ["<order>"]
    if kind is bool:
        return [], not info.default
    if get_origin(kind) is Literal:
        other = next(c for c in reversed(get_args(kind)) if c != info.default)
        return [other], other
    if get_origin(kind) is dict:
        return ["prompt=question"], {"prompt": "question"}
    return {int: (["9"], 9), float: (["0.5"], 0.5), str: (["some text"], "some text")}[kind]


@pytest.mark.parametrize("underscores", [False, True])
@pytest.mark.parametrize("name", list(TrainConfig.model_fields))
def test_every_field_has_a_flag(trained, name, underscores):
    words, value = sample(name, TrainConfig.model_fields[name])
    flag = "--" + (name if underscores else name.replace("_", "-"))
    if value is False:
        flag = flag.replace("--", "--no-")
    given = [] if name in ("model", "data") else NEEDED
    given = given or [w for w in NEEDED if w not in (flag, NEEDED[NEEDED.index(flag) + 1])]
    done = runner.invoke(app, ["train", *given, flag, *words, "--json"])
    assert done.exit_code == 0, done.output
    assert getattr(trained.config, name) == value
    others = build({"model": "demo", "data": "rows.jsonl", name: value})
    assert trained.config == others, "a flag changed more than its own field"


def test_help_has_description_and_default_of_every_field():
    text = " ".join(runner.invoke(app, ["train", "--help"]).stdout.split())
    for name, info in TrainConfig.model_fields.items():
        flag = name.replace("_", "-")
        assert f"--{flag} " in text or f"--[no-]{flag} " in text
        assert info.description in text
    assert "[default: 0.0002]" in text


def test_flags_win_over_set_and_set_over_the_file(trained, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: demo\ndata: rows.jsonl\nr: 1\nlora_alpha: 1\nseed: 1\npacking: true\n")
    words = ["--set", "lora_alpha=2", "--set", "seed=2", "--seed", "3", "--no-packing"]
    done = runner.invoke(app, ["train", str(file), *words])
    assert done.exit_code == 0, done.output
    config = trained.config
    assert (config.r, config.lora_alpha, config.seed, config.packing) == (1, 2, 3, False)


def test_several_maps(trained):
    runner.invoke(app, ["train", *NEEDED, "--map", "prompt=q", "--map", "completion=a"])
    assert trained.config.map == {"prompt": "q", "completion": "a"}


def test_all_linear_stays_one_word(trained):
    runner.invoke(app, ["train", *NEEDED, "--target-modules", "all-linear"])
    assert trained.config.target_modules == "all-linear"


@pytest.mark.parametrize("pair", ["prompt", "=found", "wanted="])
def test_a_map_without_two_sides_is_refused(pair):
    done = runner.invoke(app, ["train", *NEEDED, "--map", pair, "--json"])
    assert json.loads(done.stdout)["error"]["code"] == "FG-CLI-003"
    assert done.exit_code == 2


def test_nothing_given_names_what_is_missing():
    done = runner.invoke(app, ["train", "--json"])
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "FG-CONF-001"
    assert "'model'" in error["found"] and "'data'" in error["found"]


def test_json_has_the_promised_keys_and_nothing_else_is_on_stdout(trained):
    done = runner.invoke(app, ["train", *NEEDED, "--output", "runs/x", "--json"])
    assert json.loads(done.stdout) == {
        "run": "runs/x",
        "adapter": "runs/x/adapter",
        "steps": 7,
        "total_steps": 7,
        "loss": 1.25,
        "eval_loss": None,  # NaN is not JSON
        "seconds": 61.0,
        "tokens": 1234,
        "interrupted": False,
    }
    assert "a library that prints" in done.stderr
    assert "training ..." in done.stderr


def test_the_summary_says_what_to_type_next(trained):
    done = runner.invoke(app, ["train", *NEEDED, "--output", "runs/my run"])
    assert "finegraft chat 'runs/my run'" in done.stdout
    assert "7 steps in 1:01" in done.stdout


def test_an_interrupted_run_says_how_to_resume(trained):
    trained.interrupted = True
    done = runner.invoke(app, ["train", *NEEDED, "--output", "runs/x"])
    assert done.exit_code == 130
    assert "finegraft resume runs/x\n" in done.stdout
    done = runner.invoke(app, ["train", *NEEDED, "--json"])
    assert done.exit_code == 130
    assert json.loads(done.stdout)["interrupted"] is True


def write_run(folder, **values):
    folder.mkdir(parents=True)
    config = build({"model": "demo", "data": "rows.jsonl", "output": str(folder), **values})
    (folder / "config.yaml").write_text(config.to_yaml())
    return config


def test_resume_trains_with_the_settings_of_the_run(trained, tmp_path):
    config = write_run(tmp_path / "one", seed=11)
    done = runner.invoke(app, ["resume", str(tmp_path / "one"), "--json"])
    assert done.exit_code == 0, done.output
    assert trained.resume is True
    assert trained.config == config


def test_resume_follows_a_run_that_was_moved(trained, tmp_path):
    write_run(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    runner.invoke(app, ["resume", str(tmp_path / "two")])
    assert trained.config.output == str(tmp_path / "two")


def test_resume_without_a_run_names_the_near_one(tmp_path):
    write_run(tmp_path / "quickstart")
    done = runner.invoke(app, ["resume", str(tmp_path / "quikstart"), "--json"])
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == 2
    assert error["code"] == "FG-RUN-001"
    assert str(tmp_path / "quickstart") in error["fix"]


def test_an_error_of_training_is_the_error_of_the_command(monkeypatch):
    def train(*_, **__):
        raise DataError("FG-DATA-001", "there is no file rows.jsonl")

    monkeypatch.setattr(training_run, "train", train)
    done = runner.invoke(app, ["train", *NEEDED, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "FG-DATA-001"


def test_typer_is_given_no_default_of_its_own():
    command = typer.main.get_command(app).commands["train"]
    for param in command.params:
        if param.name in TrainConfig.model_fields:
            assert param.default in (None, (), [])
