"""``finegraft predict``: texts from anywhere, answers in any shape, and clear refusals."""

from __future__ import annotations

import json

import pytest
from classifier_tiny import base, rows, write
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.schema import build
from finegraft.fast import FastLanguageModel
from finegraft.training.run import train

runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained classifier, a causal base and adapter, and a bare encoder."""
    folder = tmp_path_factory.mktemp("predict")
    base(folder / "bert")
    base(folder / "llama", "llama")
    write(folder / "rows.jsonl", rows())
    values = {"task": "classification", "model": str(folder / "bert"), "learning_rate": 1e-2}
    values |= {"data": str(folder / "rows.jsonl"), "output": str(folder / "run")}
    train(build({**values, "num_train_epochs": 8, "dtype": "float32"}))
    model, _ = FastLanguageModel.from_pretrained(str(folder / "llama"))
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(folder / "causal")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def answers(*words, **more):
    done = runner.invoke(app, ["predict", *words, "--json"], **more)
    found = json.loads(done.stdout)
    return found.get("error") or found["predictions"]


def test_texts_on_the_command_line():
    found = answers("run", "hello so kind", "bye so kind")
    assert [one["label"] for one in found] == ["warm", "cold"]
    for one in found:
        assert set(one) == {"text", "label", "probability", "probabilities"}
        assert one["probability"] == max(one["probabilities"].values())
    done = runner.invoke(app, ["predict", "run", "hello so kind"])
    assert done.exit_code == 0
    title, line = done.stdout.splitlines()[:2]
    assert title.split() == ["label", "probability", "others", "text"]
    assert line.startswith("warm") and line.rstrip().endswith("hello so kind")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "hello so kind\n\nbye so kind\n"),
        ("a.csv", "id,review\n1,hello so kind\n2,bye so kind\n"),
        ("a.jsonl", '{"text": "hello so kind"}\n{"text": "bye so kind"}\n'),
    ],
)
def test_files_of_rows_and_lines(place, name, text):
    (place / name).write_text(text)
    assert [one["label"] for one in answers("run", "--file", name)] == ["warm", "cold"]


def test_standard_input_and_an_output_file(place):
    found = answers("run", input="hello so kind\nbye so kind\n")
    assert [one["label"] for one in found] == ["warm", "cold"]
    done = runner.invoke(app, ["predict", "run", "hello you", "--output", "out.jsonl"])
    assert done.exit_code == 0 and "1 texts, written to out.jsonl" in done.stdout
    written = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert written[0]["label"] == "warm" and written[0]["text"] == "hello you"


def test_a_column_by_name(place):
    write(place / "odd.jsonl", [{"text": "bye so", "said": "hello so"}])
    assert answers("run", "--file", "odd.jsonl", "--text-column", "said")[0]["label"] == "warm"
    error = answers("run", "--file", "odd.jsonl", "--text-column", "sad")
    assert error["code"] == "FG-CLASS-002" and "--text-column said" in error["fix"]


@pytest.mark.parametrize(
    ("model", "code", "fix"),
    [
        ("llama", "FG-CLASS-025", "finegraft generate llama"),
        ("causal", "FG-CLASS-025", "finegraft generate causal"),
        ("bert", "FG-CLASS-026", "finegraft train --task classification --model bert"),
    ],
)
def test_models_that_do_not_classify(model, code, fix):
    error = answers(model, "a text")
    assert error["code"] == code and fix in error["fix"]


def test_a_classifier_does_not_generate():
    done = runner.invoke(app, ["generate", "run", "a question", "--json"])
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "FG-CLASS-014" and "finegraft predict run" in error["fix"]


def test_nothing_to_classify():
    error = answers("run", input="")
    assert error["code"] == "FG-CLASS-024" and "predict MODEL" in error["fix"]


def test_training_says_what_to_type_next(place):
    words = ["--task", "classification", "--model", "bert", "--data", "rows.jsonl", "--max-steps"]
    done = runner.invoke(app, ["train", *words, "2", "--output", "told"])
    assert done.exit_code == 0, done.output
    assert 'finegraft predict told "your text"' in done.stdout
    assert "Held out: accuracy" in done.stdout and "as warm" in done.stdout
    done = runner.invoke(app, ["resume", "told", "--json"])
    assert set(json.loads(done.stdout)["metrics"]) >= {"accuracy", "macro_f1", "confusion", "loss"}
