"""What people get wrong: the answer says what was found, what is allowed and what to type next."""

from __future__ import annotations

import json
from pathlib import Path

import classifier_tiny
import pytest
from datasets import Dataset
from training_tiny import llama, rows, tokenizer
from typer.testing import CliRunner

from finegraft import (
    FastLanguageModel,
    PromptTuningConfig,
    SFTConfig,
    SFTTrainer,
    adapters,
    get_peft_model,
)
from finegraft.cli.main import app
from finegraft.core.errors import FinegraftError
from finegraft.training.events import read_events

PREFIX = ("--method", "prefix", "--packing", "--max-length", "32")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: str(classifier_tiny.base(folder / kind, kind)) for kind in ("bert", "llama")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with rows for both tasks."""
    monkeypatch.chdir(tmp_path)
    classifier_tiny.write(tmp_path / "labelled.jsonl", classifier_tiny.rows())
    classifier_tiny.write(tmp_path / "chats.jsonl", rows())
    return tmp_path


def answered(code, action, *words):
    """Run ``action``; its error has the code, all three parts, and these words in them."""
    with pytest.raises(FinegraftError, match=f"^{code}: ") as caught:
        action()
    _holds(caught.value.as_dict(), code, words)


def told(code, arguments, *words):
    """The same of a command line, which ends with 2, prints no traceback, and leaves no run."""
    done = CliRunner().invoke(app, [*arguments, "--output", "run", "--json"])
    assert done.exit_code == 2, done.output
    _holds(json.loads(done.stdout)["error"], code, words)


def _holds(error, code, words):
    assert error["code"] == code
    assert error["found"] and error["allowed"] and error["fix"], error
    text = " ".join(error.values())
    assert all(word in text for word in words), text


def training(model, data, *more):
    return ["train", "--model", model, "--data", data, "--dtype", "float32", *more]


def classifying(bases, *more, data="labelled.jsonl"):
    return training(bases["bert"], data, "--task", "classification", "--max-steps", "2", *more)


@pytest.mark.parametrize("name", ["ia3", "bottleneck", "bitfit", "head", "prefix", "prompt"])
def test_dora_on_a_method_that_cannot(name):
    code = "FG-ARG-001" if name in ("prefix", "prompt") else "FG-ADAPT-021"
    model = llama(attention_bias=True)
    answered(
        code,
        lambda: FastLanguageModel.get_peft_model(model, method=name, use_dora=True),
        "use_dora",
    )
    assert not hasattr(model, "peft_config")


def test_dora_on_a_method_that_cannot_by_command(place, bases):
    arguments = training(bases["llama"], "chats.jsonl", "--method", "ia3", "--use-dora")
    told("FG-CONF-006", arguments, "use_dora", "'ia3'", "remove")
    assert not (place / "run").exists()


def test_prefix_tuning_with_packing(place, bases, tmp_path):
    words = ("packing=True", "prefix", "packing=False")
    model = FastLanguageModel.get_peft_model(llama(), method="prefix")
    given = {"train_dataset": Dataset.from_list(rows()), "processing_class": tokenizer()}
    how = SFTConfig(str(tmp_path / "out"), packing=True)
    answered("FG-ADAPT-030", lambda: SFTTrainer(model, how, **given), *words)
    told("FG-ADAPT-030", training(bases["llama"], "chats.jsonl", *PREFIX), *words)
    made = training(bases["llama"], "chats.jsonl", *PREFIX[:2], "--max-steps", "1")
    assert CliRunner().invoke(app, [*made, "--output", "first"]).exit_code == 0
    told("FG-ADAPT-030", training("first", "chats.jsonl", *PREFIX[2:]), *words)
    assert not (place / "run").exists()


def test_bitfit_on_a_model_without_biases(place, bases):
    words = ("BitFit", "RMSNorm", "BERT", "ia3")
    action = lambda: FastLanguageModel.get_peft_model(llama(), method="bitfit")  # noqa: E731
    answered("FG-ADAPT-023", action, *words)
    told("FG-ADAPT-023", training(bases["llama"], "chats.jsonl", "--method", "bitfit"), *words)
    assert not (place / "run").exists()


def test_merging_prompt_tuning():
    model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=4))
    answered("FG-ADAPT-031", model.merge_and_unload, "virtual tokens", "lora")
    answered("FG-ADAPT-031", model.merge_adapter, "virtual tokens", "lora")
    answered("FG-ADAPT-071", lambda: adapters.merge_to_16bit(model), "virtual tokens", "lora")


def test_an_unknown_label_in_the_data(place, bases):
    held = [{"text": "hello now", "label": "warm"}, {"text": "bye now", "label": "clod"}]
    classifier_tiny.write(place / "held.jsonl", held)
    arguments = classifying(bases, "--eval-data", "held.jsonl")
    told("FG-CLASS-007", arguments, "held.jsonl, row 2", "'clod'", "cold, warm", "did you mean")
    arguments = classifying(bases, "--class-names", "cold,hot")
    told("FG-CLASS-006", arguments, "cold, hot", "cold, warm", "--class-names")
    assert not (place / "run").exists()


def trained(arguments):
    """Run to the end; return what it told of its rows."""
    done = CliRunner().invoke(app, [*arguments, "--output", "run", "--json"])
    assert done.exit_code == 0, done.output
    return next(line for line in read_events(Path("run/events.jsonl")) if line["type"] == "data")


def test_a_class_with_one_row(place, bases):
    lonely = [*classifier_tiny.rows(), {"text": "you are kind 99", "label": "mild"}]
    classifier_tiny.write(place / "labelled.jsonl", lonely)
    data = trained(classifying(bases))
    assert data["labels"]["mild"] == 1
    assert any("one text" in line and "'mild'" in line for line in data["warnings"])
    classifier_tiny.write(place / "one.jsonl", [r for r in lonely if r["label"] == "warm"])
    arguments = classifying(bases, "--overwrite", data="one.jsonl")
    told("FG-CLASS-008", arguments, "'warm'", "two classes", "--label-column")


def test_labels_as_words_get_a_mapping_that_is_told_and_saved(place, bases):
    data = trained(classifying(bases))
    assert list(data["labels"]) == ["cold", "warm"]
    record = json.loads((place / "run" / "data.json").read_text())
    assert record["class_names"] == ["cold", "warm"]
    note = json.loads((place / "run" / "adapter" / "finegraft.json").read_text())
    assert note["labels"] == ["cold", "warm"]
    done = CliRunner().invoke(app, ["predict", "run", "hello now", "--json"])
    assert json.loads(done.stdout)["predictions"][0]["label"] in ("cold", "warm")
