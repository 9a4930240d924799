"""Spans in texts: windows of long ones, probabilities, the front door, and the command line."""

from __future__ import annotations

import json

import pytest
import torch
from classifier_tiny import base, write
from test_training_tags import rows, settings
from typer.testing import CliRunner

from finegraft.classifier import FastClassifier
from finegraft.cli.main import app
from finegraft.core.errors import ConfigError, DataError, ModelError
from finegraft.inference import tag
from finegraft.training.run import train

runner = CliRunner()
TEXT = "world now you are so kind today 99"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tags")
    base(folder / "bert")
    base(folder / "llama", "llama")  # knows no absolute positions, so windows are alike to it
    write(folder / "rows.jsonl", rows())
    changes = {"data": str(folder / "rows.jsonl"), "output": str(folder / "run")}
    train(settings(folder / "llama", **changes))
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def opened(place):
    return FastClassifier.from_pretrained(str(place / "run"), dtype="float32", max_seq_length=32)


def test_spans_with_places_and_probabilities(opened):
    model, tokenizer = opened
    model.train()
    heard = []
    texts = [TEXT, "hello you", f"  {TEXT}"]
    said = tag.predict(
        model, tokenizer, texts, batch_size=2, on_progress=lambda *x: heard.append(x)
    )
    assert heard == [(2, 3), (3, 3)] and model.training
    assert [len(one.entities) for one in said] == [2, 0, 2]
    for one in said:
        for found in one.entities:
            assert one.text[found.start : found.end] == found.text and 0 < found.probability <= 1
    assert said[2].entities[0].start == 2
    least = max(found.probability for found in said[0].entities)
    fewer = tag.predict(model, tokenizer, TEXT, threshold=min(least, 0.9999999))[0].entities
    assert 0 < len(fewer) < 2
    with torch.no_grad():
        logits = model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits[0].softmax(-1)
    names = [model.config.id2label[i] for i in range(5)]
    at = tokenizer(TEXT).char_to_token(TEXT.index("today"))
    alone = sum(logits[at, i].item() for i, name in enumerate(names) if name.endswith("time"))
    assert said[0].entities[1].probability == pytest.approx(alone, abs=1e-5)


def test_a_text_of_several_windows_is_read_whole(opened):
    model, tokenizer = opened
    text = " ".join(["hello you are so"] * 30 + [TEXT] + ["bye so kind"] * 50 + ["world now today"])
    assert len(tokenizer(text)["input_ids"]) > 2 * tokenizer.model_max_length
    found = tag.predict(model, tokenizer, [text, TEXT], batch_size=3)
    told = [entity.text for entity in found[0].entities]
    assert told.count("world now") == 2 and told.count("today") == 2
    spans = [(entity.start, entity.end) for entity in found[0].entities]
    assert spans == sorted(set(spans))
    assert [entity.text for entity in found[1].entities] == ["world now", "today"]


def test_what_cannot_be_tagged(opened, place):
    model, tokenizer = opened
    with pytest.raises(DataError, match=r"FG-CLASS-020: text 2 is ''"):
        tag.predict(model, tokenizer, ["a", ""])
    with pytest.raises(ConfigError, match=r"FG-CLASS-021"):
        tag.predict(model, tokenizer, "a", threshold=2.0)
    with pytest.raises(ConfigError, match=r"FG-CLASS-044: pairs"):
        FastClassifier.predict(model, tokenizer, ["a"], pairs=["b"])
    with pytest.raises(ConfigError, match=r"FG-CLASS-040"):
        tag.predict(model, object(), "a")
    other, words = FastClassifier.from_pretrained(str(place / "bert"))
    with pytest.raises(ConfigError, match=r"FG-CLASS-042: BertForSequenceClassification"):
        tag.predict(other, words, "a")


def test_the_front_door(place):
    bert = str(place / "bert")
    model, tokenizer = FastClassifier.from_pretrained(
        bert, task="token-classification", id2label=["O", "B-x", "I-x"], dtype="float32"
    )
    model = FastClassifier.get_peft_model(model, r=2)
    assert type(model).__name__ == "PeftModelForTokenClassification"
    assert FastClassifier.predict(model, tokenizer, TEXT)[0].text == TEXT
    with pytest.raises(ConfigError, match=r"(?s)FG-CLASS-043: .*'token-classification'"):
        FastClassifier.from_pretrained(bert, task="token-clasification")
    with pytest.raises(ModelError, match=r"FG-CLASS-015"):
        FastClassifier.from_pretrained(str(place / "run"), task="sequence-classification")


def test_the_command_line():
    done = runner.invoke(app, ["predict", "run", TEXT, "hello you", "--json"])
    found = json.loads(done.stdout)["predictions"]
    assert [set(one) for one in found] == [{"text", "entities"}] * 2
    keys = {"start", "end", "text", "label", "probability"}
    assert [set(entity) for entity in found[0]["entities"]] == [keys, keys]
    assert found[0]["entities"][0]["text"] == "world now" and found[1]["entities"] == []
    done = runner.invoke(app, ["predict", "run", TEXT, "hello you"])
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["label", "probability", "found", "text"]
    assert lines[1].startswith("place") and "world now" in lines[1]
    assert lines[2].startswith("time") and lines[3].startswith("(none)")
    done = runner.invoke(app, ["predict", "run", TEXT, "--output", "out.jsonl"])
    assert done.exit_code == 0
    with open("out.jsonl", encoding="utf-8") as written:
        assert len(json.loads(written.read())["entities"]) == 2


def test_training_says_what_to_type_next():
    words = ["--task", "token_classification", "--model", "bert", "--data", "rows.jsonl"]
    done = runner.invoke(app, ["train", *words, "--max-steps", "2", "--output", "told"])
    assert done.exit_code == 0, done.output
    assert 'finegraft predict told "your text"' in done.stdout and "Held out: f1" in done.stdout
