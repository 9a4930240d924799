"""``task: token_classification`` from rows to a folder that finds spans; measures; parity."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from classifier_tiny import base, write
from training_tiny import WORDS

from finegraft.classifier import FastClassifier
from finegraft.core.errors import ConfigError, DataError
from finegraft.core.schema import build, default_of
from finegraft.models import families
from finegraft.training import entities
from finegraft.training.run import train

TAGS = ("O", "B-place", "I-place", "B-time", "I-time")


def rows(count=60):
    """``world now`` is a place, ``today`` is a time."""
    out = []
    for i in range(count):
        words = [WORDS[(i * 7 + j * (1 + i // 10)) % 10] for j in range(6)]
        words = [word for word in words if word not in ("world", "now", "today")] + [str(i)]
        marks = ["O"] * len(words)
        if i % 3:
            at = i // 3 % 2  # first in the text or not: without and with a space before it
            words[at:at], marks[at:at] = ["world", "now"], ["B-place", "I-place"]
        if i % 2:
            words.insert(len(words) - 1, "today")
            marks.insert(len(marks) - 1, "B-time")
        out.append({"tokens": words, "tags": marks})
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: base(folder / kind, kind) for kind in ("bert", "distilbert", "roberta", "llama")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", rows())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(model, **changes):
    values = {"task": "token_classification", "model": str(model), "data": "rows.jsonl"}
    values |= {"output": "run", "learning_rate": 1e-2, "dtype": "float32", "warmup_steps": 0}
    return build({**values, "num_train_epochs": 8, "per_device_train_batch_size": 8, **changes})


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "llama"])
def test_a_run_learns_and_its_folder_answers(place, bases, kind):
    heard = []
    result = train(settings(bases[kind], num_train_epochs=14), listener=heard.append)
    assert result.metrics["f1"] >= 0.9 and set(result.metrics["per_class"]) == {"place", "time"}
    evaluations = [event for event in heard if event["type"] == "eval"]
    assert max(e["metrics"]["f1"] for e in evaluations) == result.metrics["f1"]
    told = next(event for event in heard if event["type"] == "data")
    assert set(told["labels"]) == {"place", "time"} and told["held_out"] >= 10
    note = json.loads((result.adapter / "finegraft.json").read_text())
    assert note["labels"] == ["O", "B-place", "I-place", "B-time", "I-time"]
    saved = json.loads((result.adapter / "adapter_config.json").read_text())
    assert saved["task_type"] == "TOKEN_CLS"
    model, tokenizer = FastClassifier.from_pretrained("run", dtype="float32")
    said = FastClassifier.predict(model, tokenizer, "world now you are so kind today 99")[0]
    assert [(e.text, e.label) for e in said.entities] == [("world now", "place"), ("today", "time")]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_padding_logits_and_gradients_are_stock(bases, kind, dtype):
    """Ragged batch, labels on some tokens; padding gets no logits that mean anything."""
    torch.manual_seed(0)
    stock = transformers.AutoModelForTokenClassification.from_pretrained(
        bases[kind], num_labels=5, dtype=dtype
    ).eval()
    fast = transformers.AutoModelForTokenClassification.from_pretrained(
        bases[kind], num_labels=5, dtype=dtype
    ).eval()
    fast.load_state_dict(stock.state_dict())
    assert families.apply(fast) > 0 and type(getattr(fast, kind)).__name__.startswith("Fast")
    lengths = (5, 23, 1, 40, 17)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 600, mask.shape).where(mask, 0)
    labels = torch.randint(0, 5, ids.shape).where(mask & (ids % 3 > 0), -100)
    for model in (stock, fast):
        out = model(input_ids=ids, attention_mask=mask.long(), labels=labels)
        out.loss.backward()
        model.found = out.logits[mask].detach()
    close = (
        {"atol": 1e-12, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-4}
    )
    torch.testing.assert_close(fast.found, stock.found, **close)
    for (name, mine), theirs in zip(fast.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name, **close)


def test_full_fine_tuning_is_opened_by_stock_transformers_and_trained_further(place, bases):
    result = train(settings(bases["bert"], full_finetuning=True, max_steps=2))
    stock = transformers.AutoModelForTokenClassification.from_pretrained(result.adapter)
    assert tuple(stock.config.id2label.values()) == TAGS
    times = [
        {"tokens": row["tokens"], "tags": [t if "time" in t else "O" for t in row["tags"]]}
        for row in rows()
    ]
    write(place / "times.jsonl", times)
    more = settings(result.adapter, data="times.jsonl", output="second", max_steps=1)
    second = train(more)
    assert tuple(second.model.config.id2label.values()) == TAGS


def test_an_adapter_goes_on_with_its_own_tags(place, bases):
    first = train(settings(bases["bert"], max_steps=1))
    assert train(settings(first.adapter, output="second", max_steps=1)).adapter.is_dir()
    write(place / "rows.jsonl", [{"tokens": ["hello"], "tags": ["B-greeting"]}] * 3 + rows(9))
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-041: .*B-greeting.*was trained with O"):
        train(settings(first.adapter, output="third"))


def test_held_out_rows_of_their_own(place, bases):
    held = [*rows(80)[60:], rows()[0]]
    write(place / "held.jsonl", held)
    heard = []
    changes = {"eval_data": "held.jsonl", "max_steps": 1, "class_weights": "balanced"}
    train(settings(bases["bert"], **changes), listener=heard.append)
    told = next(event for event in heard if event["type"] == "data")
    assert (told["rows"], told["held_out"]) == (59, 21)
    assert "1 training rows are not used" in told["warnings"][0]
    write(place / "held.jsonl", [*held, {"tokens": ["hello"], "tags": ["B-tim"]}])
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-037: held.jsonl, row 22: .*'time'"):
        train(settings(bases["bert"], eval_data="held.jsonl", output="other"))
    write(place / "held.jsonl", rows())
    with pytest.raises(DataError, match=r"FG-CLASS-018"):
        train(settings(bases["bert"], eval_data="held.jsonl", output="other"))


def test_what_the_rows_warn_of(place, bases):
    spans = [{"text": f"hello world {i}", "entities": [[6, 11, "place"]]} for i in range(30)]
    spans += [{"text": "bye worlds", "entities": [[4, 9, "place"]]}, spans[0]]
    spans += [{"text": "hello " * 300 + "world", "entities": [[1800, 1805, "place"]]}]
    write(place / "rows.jsonl", spans)
    heard = []
    train(settings(bases["bert"], max_steps=1), listener=heard.append)
    told = next(event for event in heard if event["type"] == "data")
    words = " ".join(told["warnings"])
    assert "1 texts stand there more than once" in words
    assert "begin or end inside a word are left out" in words and "row 31" in words
    assert told["truncated"] == 1 and "1 texts are longer than 96 tokens" in words
    off = [{"text": f"hello world {i}", "entities": [[5, 10, "place"]]} for i in range(9)]
    write(place / "rows.jsonl", off)
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-036: .*\d of \d spans .*first in row"):
        train(settings(bases["bert"], output="other"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problem_type": "regression"}, r"FG-CLASS-030: problem_type"),
        ({"text_pair_column": "x"}, r"FG-CLASS-030: text_pair_column"),
        ({"packing": True}, r"FG-CLASS-001: packing"),
        ({"metric_for_best_model": "macro_f1"}, r"(?s)FG-CLASS-016: .*f1, precision"),
        ({"early_stopping_patience": 1, "eval_fraction": 0.0}, r"FG-CLASS-017: early"),
    ],
)
def test_settings_that_do_not_fit(place, bases, changes, words):
    with pytest.raises(ConfigError, match=words):
        train(settings(bases["bert"], **changes))
    assert not (place / "run").exists()


def test_the_texts_are_audited(place, bases):
    damaged = {"tokens": ["caf\u00c3\u00a9", "world"], "tags": ["O", "B-place"]}
    write(place / "rows.jsonl", [*rows(), damaged])
    heard = []
    train(settings(bases["bert"], max_steps=1), listener=heard.append)
    audit = json.loads((place / "run" / "data.json").read_text())["audit"]
    found = next(f for f in audit["findings"] if f["rows"] == [61])
    assert found["message"] in " ".join(next(e for e in heard if e["type"] == "data")["warnings"])
    train(settings(bases["bert"], max_steps=1, data_check=False, output="off"))
    assert json.loads((place / "off" / "data.json").read_text())["audit"] is None


def test_without_held_out_rows_the_last_step_is_kept(place, bases):
    result = train(settings(bases["bert"], eval_fraction=0.0, max_steps=1))
    assert result.metrics is None and result.adapter.is_dir()


def test_defaults_are_of_the_task():
    assert default_of("learning_rate", "token_classification") == 1e-3
    assert default_of("eval_fraction", "token_classification") == 0.2


def test_entities_are_counted_whole():
    """A hand-made case: 4 true spans, 5 said, 2 right in place and type."""
    true = [["B-a", "I-a", "O", "B-b", "O"], ["B-a", "B-a", "O"]]
    said = [["B-a", "I-a", "O", "B-a", "B-b"], ["B-a", "I-a", "B-b"]]
    found = entities.measure(true, said)
    assert found["precision"] == pytest.approx(1 / 5) and found["recall"] == pytest.approx(1 / 4)
    assert found["f1"] == pytest.approx(2 / 9) and found["accuracy"] == pytest.approx(4 / 8)
    assert found["per_class"]["a"]["rows"] == 3 and found["per_class"]["b"]["f1"] == 0.0
    assert found["per_class"]["a"]["precision"] == pytest.approx(1 / 3)
    assert entities.measure([["O"]], [["O"]])["f1"] == 0.0
    assert entities.measure(true, true)["f1"] == entities.measure(true, true)["accuracy"] == 1.0


def test_measure_skips_what_has_no_tag():
    class Predicted:
        predictions = np.array([[1, 4, 2, 0, -100], [0, 0, 3, -100, -100]])
        label_ids = np.array([[1, -100, 2, 0, -100], [0, 0, 3, -100, -100]])

    measure = entities.Measure(TAGS)
    assert measure(Predicted())["f1"] == 1.0 and measure.last["per_class"]["place"]["rows"] == 1


def test_the_loss_is_torchs():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 7, 3), torch.randint(0, 3, (2, 5))
    labels[0, 2:] = -100
    flat = logits[:, 2:].reshape(-1, 3)  # two positions of a trained prompt in front
    out = {"logits": logits}
    plain = F.cross_entropy(flat, labels.flatten())
    torch.testing.assert_close(entities.loss_of()(out, labels), plain)
    torch.testing.assert_close(entities.loss_of()(out, labels, 14), plain / 2)
    weights = torch.tensor([0.5, 1.0, 2.0])
    summed = F.cross_entropy(flat, labels.flatten(), weights, reduction="sum")
    torch.testing.assert_close(entities.loss_of(weights.tolist())(out, labels), summed / 7)
    assert entities.likeliest(logits, labels).shape == labels.shape
