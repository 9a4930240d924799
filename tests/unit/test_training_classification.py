"""``task: classification`` from rows to a folder that answers, resumes, and explains itself."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from classifier_tiny import base, rows, write

from finegraft.classifier import FastClassifier
from finegraft.core.errors import ConfigError, DataError, ModelError
from finegraft.core.schema import build, default_of, from_file
from finegraft.data.labels import CLASSES, SEVERAL, VALUES
from finegraft.training.classifier import loss_of
from finegraft.training.events import read_events
from finegraft.training.run import train


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of bases, one of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: base(folder / kind, kind) for kind in ("bert", "distilbert", "llama")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", rows())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(model, **changes):
    values = {"task": "classification", "model": str(model), "data": "rows.jsonl", "output": "run"}
    values |= {"learning_rate": 1e-2, "dtype": "float32", "num_train_epochs": 3, "warmup_steps": 0}
    return build({**values, **changes})


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_a_run_learns_and_its_folder_answers(place, bases, kind):
    heard = []
    result = train(settings(bases[kind], num_train_epochs=8), listener=heard.append)
    assert result.metrics["accuracy"] >= 0.9 and result.task == "classification"
    assert result.tokens > 0 and not result.interrupted
    run = place / "run"
    assert json.loads((run / "report" / "metrics.json").read_text()) == result.metrics
    assert heard[-1]["metrics"] == result.metrics and read_events(run / "events.jsonl") == heard
    evaluations = [event for event in heard if event["type"] == "eval"]
    assert len(evaluations) == 8
    assert max(e["metrics"]["macro_f1"] for e in evaluations) == result.metrics["macro_f1"]
    told = next(event for event in heard if event["type"] == "data")
    assert told["labels"] == {"cold": 19, "warm": 19} and told["held_out"] == 10
    note = json.loads((run / "adapter" / "finegraft.json").read_text())
    assert note["labels"] == ["cold", "warm"]
    model, tokenizer = FastClassifier.from_pretrained("run", dtype="float32")
    texts = ["hello now so very kind 77", "bye you are today 78"]
    said = FastClassifier.predict(model, tokenizer, texts)
    assert [one.label for one in said] == ["warm", "cold"]
    again = FastClassifier.predict(result.model, result.tokenizer, texts)
    assert [one.probability for one in said] == pytest.approx([one.probability for one in again])


def test_the_base_without_a_pooler_comes_back_the_same(place, bases, tmp_path):
    from transformers import BertModel

    bare = BertModel.from_pretrained(bases["bert"], add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    for file in bases["bert"].glob("token*"):
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    result = train(settings(tmp_path / "bare", max_steps=2))
    saved = json.loads((result.adapter / "adapter_config.json").read_text())
    assert any("pooler" in name for name in saved["modules_to_save"])
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(99)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare", num_labels=2)
    plain = PeftModel.from_pretrained(plain, str(result.adapter)).eval()
    batch = result.tokenizer(["hello now", "bye you are"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = result.model.eval()(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(place, bases):
    from finegraft.training import checkpoint

    whole = train(settings(bases["bert"], save_steps=2, save_total_limit=20, output="whole"))
    half = settings(bases["bert"], save_steps=2, save_total_limit=20, output="half")
    train(half)
    import shutil

    for path in checkpoint.checkpoints(place / "half" / "checkpoints")[2:]:
        shutil.rmtree(path)
    shutil.rmtree(place / "half" / "adapter")
    resumed = train(from_file(place / "half" / "config.yaml"), resume=True)
    assert resumed.metrics == whole.metrics
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_the_best_epoch_is_kept_and_training_stops_early(place, bases):
    heard = []
    result = train(
        settings(
            bases["bert"],
            num_train_epochs=30,
            early_stopping_patience=2,
            metric_for_best_model="loss",
            learning_rate=3e-2,
        ),
        listener=heard.append,
    )
    losses = [event["loss"] for event in heard if event["type"] == "eval"]
    assert result.steps < result.total_steps
    assert len(losses) == losses.index(min(losses)) + 3
    assert result.eval_loss == pytest.approx(min(losses), abs=1e-6)


def test_held_out_rows_of_their_own(place, bases):
    held = [*rows(60)[48:], {**rows()[0], "text": rows()[0]["text"].upper()}]
    write(place / "held.jsonl", held)
    heard = []
    train(settings(bases["bert"], eval_data="held.jsonl", max_steps=1), listener=heard.append)
    told = next(event for event in heard if event["type"] == "data")
    assert (told["rows"], told["held_out"]) == (47, 13)
    assert "1 training rows are not used" in told["warnings"][0]
    write(place / "held.jsonl", [*held, {"text": "new", "label": "wram"}])
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-007: held.jsonl, row 14: .*'warm'"):
        train(settings(bases["bert"], eval_data="held.jsonl", output="other"))
    assert not (place / "other").exists()
    write(place / "held.jsonl", rows())
    with pytest.raises(DataError, match=r"FG-CLASS-018: no rows are left"):
        train(settings(bases["bert"], eval_data="held.jsonl", output="other"))


@pytest.mark.parametrize(
    ("values", "problem", "measure"),
    [
        (lambda i: ["cold"] if i % 2 else ["warm", "odd"], SEVERAL, "micro_f1"),
        (lambda i: i % 2 + 0.5, VALUES, "mse"),
    ],
)
def test_several_labels_and_values(place, bases, values, problem, measure):
    write(place / "rows.jsonl", [{**row, "label": values(i)} for i, row in enumerate(rows())])
    result = train(settings(bases["bert"], num_train_epochs=6))
    assert result.metrics["micro_f1"] > 0.9 if problem == SEVERAL else result.metrics["mse"] < 0.1
    assert measure in result.metrics
    model, tokenizer = FastClassifier.from_pretrained("run")
    assert model.config.problem_type == problem
    said = FastClassifier.predict(model, tokenizer, "bye so kind 99")[0]
    if problem == SEVERAL:
        assert said.label == ["odd", "warm"] and set(said.probabilities) == {"cold", "odd", "warm"}
    else:
        assert said.value == pytest.approx(0.5, abs=0.4) and said.label is None


def test_sentence_pairs_and_names_for_numbers(place, bases):
    pairs = [
        {"premise": r["text"], "hypothesis": "so", "label": i % 2} for i, r in enumerate(rows())
    ]
    write(place / "rows.jsonl", pairs)
    result = train(settings(bases["bert"], class_names="no, yes", max_steps=2))
    assert set(result.metrics["per_class"]) == {"no", "yes"}
    model, tokenizer = FastClassifier.from_pretrained("run")
    said = FastClassifier.predict(model, tokenizer, ["bye"], pairs=["so"])
    assert said[0].label in ("no", "yes") and said[0].as_dict()["text_pair"] == "so"


def test_full_fine_tuning_saves_a_classifier_that_stock_transformers_opens(place, bases):
    from transformers import AutoModelForSequenceClassification

    result = train(settings(bases["bert"], full_finetuning=True, max_steps=2))
    config = json.loads((result.adapter / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    stock = AutoModelForSequenceClassification.from_pretrained(result.adapter)
    assert stock.config.id2label == {0: "cold", 1: "warm"}
    assert FastClassifier.from_pretrained("run")[0].config.id2label == stock.config.id2label


def test_an_adapter_goes_on_training_with_its_own_labels(place, bases):
    first = train(settings(bases["bert"], max_steps=2))
    write(place / "more.jsonl", rows(48)[24:])
    more = settings(first.adapter, data="more.jsonl", output="second", max_steps=2)
    assert train(more).model.config.id2label == {0: "cold", 1: "warm"}
    write(place / "more.jsonl", rows(24, ("hot", "warm")))
    with pytest.raises(DataError, match=r"FG-CLASS-011: .*hot, warm.*cold, warm"):
        train(more.model_copy(update={"output": "third"}))


def test_what_the_rows_warn_of(place, bases):
    long = {"text": "hello " * 300, "label": "warm"}
    given = [*rows(), {**rows()[0], "label": "warm"}, {"text": "one", "label": "rare"}, long]
    write(place / "rows.jsonl", given)
    heard = []
    changes = {"class_weights": "balanced", "truncation_side": "left", "max_steps": 1}
    train(settings(bases["bert"], **changes), listener=heard.append)
    told = next(event for event in heard if event["type"] == "data")
    words = " ".join(told["warnings"])
    assert "1 texts stand there more than once" in words and "different labels" in words
    assert "cannot be split, it is trained and not evaluated: 'rare'" in words
    assert told["truncated"] == 1 and "1 texts are longer than 96 tokens" in words
    assert "their beginning is cut off" in words


def test_settings_that_do_not_fit(place, bases):
    cases = [
        ({"packing": True}, ConfigError, r"FG-CLASS-001: packing with task 'classification'"),
        ({"task": "causal", "label_column": "x"}, ConfigError, r"FG-CLASS-001: label_column"),
        ({"metric_for_best_model": "accurracy"}, ConfigError, r"(?s)FG-CLASS-016.*'accuracy'"),
        (
            {"early_stopping_patience": 1, "eval_fraction": 0.0},
            ConfigError,
            r"FG-CLASS-017: early",
        ),
        (
            {"class_weights": "balanced", "data": "values.jsonl"},
            ConfigError,
            r"FG-CLASS-017: class_weights",
        ),
    ]
    write(place / "values.jsonl", [{"text": f"t {i}", "label": i + 0.5} for i in range(9)])
    for changes, kind, words in cases:
        with pytest.raises(kind, match=words):
            train(settings(bases["bert"], **changes))
    assert not (place / "run").exists()


def test_an_adapter_of_another_task(place, bases):
    train(settings(bases["llama"], max_steps=1))
    with pytest.raises(ModelError, match=r"(?s)FG-CLASS-014.*finegraft predict run"):
        from finegraft.fast import FastLanguageModel

        FastLanguageModel.from_pretrained("run")


def test_without_held_out_rows_the_last_step_is_kept(place, bases):
    heard = []
    result = train(settings(bases["bert"], eval_fraction=0.0, max_steps=1), listener=heard.append)
    assert result.metrics is None and result.adapter.is_dir()
    told = next(event for event in heard if event["type"] == "data")
    assert "no rows are held out" in told["warnings"][0]


def test_defaults_are_of_the_task():
    config = build({"task": "classification", "model": "demo-encoder", "data": "x"})
    assert (config.learning_rate, config.eval_fraction) == (5e-4, 0.2)
    assert default_of("learning_rate", "causal") == 2e-4
    given = {"task": "classification", "model": "m", "data": "x", "eval_fraction": 0.5}
    assert build(given).eval_fraction == 0.5


def test_losses_are_torchs():
    torch.manual_seed(0)
    logits, weights = torch.randn(6, 3), [0.5, 1.0, 2.0]
    ids, many = torch.tensor([0, 1, 2, 0, 1, 0]), torch.randint(0, 2, (6, 3)).float()
    out = {"logits": logits}
    plain = F.cross_entropy(logits, ids)
    torch.testing.assert_close(loss_of(CLASSES)(out, ids), plain)
    torch.testing.assert_close(loss_of(CLASSES)(out, ids, num_items_in_batch=12), plain / 2)
    weighted = F.cross_entropy(logits, ids, weight=torch.tensor(weights), reduction="none").mean()
    torch.testing.assert_close(loss_of(CLASSES, weights)(out, ids), weighted)
    several = F.binary_cross_entropy_with_logits(logits, many, pos_weight=torch.tensor(weights))
    torch.testing.assert_close(loss_of(SEVERAL, weights)(out, many), several)
    values = {"logits": logits[:, :1]}
    expected = F.mse_loss(logits[:, 0], many[:, 0])
    torch.testing.assert_close(loss_of(VALUES)(values, many[:, 0]), expected)
