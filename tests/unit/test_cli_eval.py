"""``finegraft eval`` on tiny models: which rows, which numbers, and clear refusals."""

from __future__ import annotations

import json

import pytest
import torch
from classifier_tiny import base, rows, write
from typer.testing import CliRunner

from finegraft import adapters
from finegraft.cli.main import app
from finegraft.core.schema import build
from finegraft.fast import FastLanguageModel
from finegraft.training.run import train

runner = CliRunner()
WORDS = ["hello", "world", "bye", "now", "you", "are", "so", "very", "kind", "today"]


def pairs(count):
    return [
        {"prompt": f"{WORDS[i % 10]} {WORDS[i // 10 % 10]}", "completion": WORDS[(i * 3) % 10]}
        for i in range(count)
    ]


def lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A causal run that held rows out, one that did not, and a classifier's run."""
    folder = tmp_path_factory.mktemp("eval")
    base(folder / "llama", "llama")
    lines(folder / "rows.jsonl", pairs(60))
    values = {"model": str(folder / "llama"), "data": str(folder / "rows.jsonl"), "max_steps": 12}
    values |= {"learning_rate": 1e-2, "dtype": "float32", "max_length": 128}
    train(build({**values, "output": str(folder / "run"), "eval_fraction": 0.2}))
    train(build({**values, "output": str(folder / "nothing-held-out"), "max_steps": 1}))
    base(folder / "bert")
    write(folder / "labelled.jsonl", rows())
    values = {"task": "classification", "model": str(folder / "bert"), "learning_rate": 1e-2}
    values |= {"data": str(folder / "labelled.jsonl"), "output": str(folder / "labels")}
    train(build({**values, "num_train_epochs": 4, "dtype": "float32"}))
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def evaluated(*words, status=0):
    done = runner.invoke(app, ["eval", *words, "--json"])
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def refused(code, *words):
    error = evaluated(*words, status=2)["error"]
    assert error["code"] == code, error
    assert error["fix"]
    return error


def test_a_run_is_examined_on_the_rows_that_it_held_out(place):
    found = evaluated("run", "--vs", "base")
    held = pairs(60)[48:]
    whole = json.loads((place / "run" / "report" / "eval.json").read_text())
    assert [row["reference"] for row in whole["answers"]] == [row["completion"] for row in held]
    assert found["data"]["rows"] == 12 and "eval_fraction 0.2" in found["data"]["origin"]
    assert "answers" not in found and found["report"] == "run/report/eval.json"
    assert set(found["metrics"]) == {"loss", "perplexity", "exact_match", "chrf"}
    for one in found["metrics"].values():
        assert {"value", "interval", "other", "other_interval", "difference", "change"} <= set(one)
    pair = found["pairwise"]
    assert pair["wins"] + pair["ties"] + pair["losses"] == 12
    events = [json.loads(line) for line in (place / "run" / "events.jsonl").open()]
    trained = [event["loss"] for event in events if event["type"] == "eval"][-1]
    assert found["metrics"]["loss"]["value"] == pytest.approx(trained, rel=1e-3)
    assert found["metrics"]["loss"]["change"] == "better"


def test_base_is_the_model_without_its_adapter(place):
    other = evaluated("run", "--vs", "base", "--limit", "5")["metrics"]
    alone = evaluated("llama", "--data", "held-of-run.jsonl", "--limit", "5")["metrics"]
    for name in ("loss", "exact_match", "chrf"):
        assert other[name]["other"] == pytest.approx(alone[name]["value"], rel=1e-4), name


@pytest.fixture(autouse=True, scope="module")
def _held_of_run(place):
    lines(place / "held-of-run.jsonl", pairs(60)[48:])


def test_two_runs_are_compared_one_after_the_other():
    found = evaluated("run", "--vs", "nothing-held-out", "--metrics", "loss")
    assert found["versus"] == "nothing-held-out"
    assert set(found["metrics"]) == {"loss"} and "pairwise" not in found
    assert found["metrics"]["loss"]["change"] == "better"


def test_rows_that_were_trained_on_are_left_out(place):
    lines(place / "mixed.jsonl", [*pairs(3), {"prompt": "Hello  HELLO", "completion": "hello"}])
    lines(place / "fresh.jsonl", [*pairs(3), {"prompt": "today", "completion": "now"}])
    found = evaluated("run", "--data", "fresh.jsonl", "--metrics", "loss")
    assert found["data"]["rows"] == 1 and found["data"]["trained_on_left_out"] == 3
    # case and spacing do not make a row new
    refused("FG-EVAL-004", "run", "--data", "mixed.jsonl")


def test_a_model_needs_rows_and_says_that_it_cannot_know_them():
    refused("FG-EVAL-003", "llama")
    assert "did you mean run?" in refused("FG-EVAL-003", "runn")["fix"]
    found = evaluated("llama", "--data", "rows.jsonl", "--metrics", "loss", "--limit", "7")
    assert found["data"]["rows"] == 7
    notes = " ".join(found["data"]["notes"])
    assert "not known" in notes and "7 of 60" in notes
    assert found["report"] is None
    refused("FG-EVAL-006", "llama", "--data", "rows.jsonl", "--vs", "base", "--limit", "2")


def test_a_run_without_held_out_rows_is_refused():
    error = refused("FG-EVAL-001", "nothing-held-out")
    assert "--data" in error["fix"]


def test_a_changed_file_is_refused(place):
    text = (place / "rows.jsonl").read_text()
    try:
        lines(place / "rows.jsonl", pairs(59))
        refused("FG-EVAL-002", "run")
    finally:
        (place / "rows.jsonl").write_text(text)


def test_an_unfinished_run_is_refused(place):
    (place / "half").mkdir()
    for name in ("config.yaml", "data.json"):
        (place / "half" / name).write_text((place / "run" / name).read_text())
    assert "finegraft resume" in refused("FG-EVAL-009", "half")["fix"]


def test_metrics_are_chosen_by_name(place):
    (place / "letters.py").write_text(
        "def score(prompt, answer, reference):\n    return float(len(prompt))\n"
    )
    words = ["run", "--metrics", "bleu,rougel", "--scorer", "letters.py", "--limit", "3"]
    found = evaluated(*words)
    assert set(found["metrics"]) == {"bleu", "rougel", "letters"}
    lengths = [len(pairs(60)[48:][i * 12 // 3]["prompt"]) for i in range(3)]
    assert found["metrics"]["letters"]["value"] == pytest.approx(sum(lengths) / 3)
    assert found["examples"]["worst"][0]["by"] == "letters"
    assert "near" not in refused("FG-CORE-001", "run", "--metrics", "blue")["fix"]
    every = evaluated("run", "--metrics", "all", "--limit", "2")["metrics"]
    assert {"rouge1", "rouge2", "rougel", "bleu"} < set(every)


def test_raw_text_has_a_loss_and_no_answers(place):
    lines(place / "text.jsonl", [{"text": "hello world you are kind"}, {"text": "bye now"}])
    assert set(evaluated("llama", "--data", "text.jsonl")["metrics"]) == {"loss", "perplexity"}
    refused("FG-EVAL-005", "llama", "--data", "text.jsonl", "--metrics", "chrf")


def test_lm_eval_is_told_to_be_missing(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name)
    )
    error = refused("FG-EVAL-007", "run", "--lm-eval", "arc_easy")
    assert "pip install lm-eval" in error["fix"]


def test_people_see_a_table_and_the_rows_that_changed():
    done = runner.invoke(app, ["eval", "run", "--vs", "base"])
    assert done.exit_code == 0, done.output
    for words in ("On 12 held-out rows", "perplexity", "Closer to the reference", "Lost most"):
        assert words in done.stdout, done.stdout


def test_answers_are_those_of_generate(place):
    from finegraft.inference.generate import complete

    found = evaluated("run", "--limit", "4", "--metrics", "exact_match")
    kept = json.loads((place / found["report"]).read_text())["answers"]
    model, tokenizer = FastLanguageModel.from_pretrained("run", dtype=torch.float32)
    FastLanguageModel.for_inference(model)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in kept]
    longest = max(len(tokenizer(row["reference"])["input_ids"]) for row in kept)
    said = complete(model, tokenizer, asked, max_new_tokens=max(16, int(1.5 * longest) + 9))
    assert [row["answer"][:20] for row in kept] == [text[:20] for text in said]
    with adapters.named.disabled(model):
        assert complete(model, tokenizer, asked, max_new_tokens=8) != [t[:8] for t in said]


# classifiers


def test_a_classifier_is_measured_as_by_its_training(place):
    found = evaluated("labels")
    trained = json.loads((place / "labels" / "report" / "metrics.json").read_text())
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(trained["accuracy"])
    assert found["metrics"]["macro_f1"]["value"] == pytest.approx(trained["macro_f1"])
    assert found["measures"]["confusion"] == trained["confusion"]
    assert "most frequent label" in " ".join(found["data"]["notes"])
    assert (place / "labels" / "report" / "eval.json").is_file()


def test_a_classifiers_trained_rows_are_left_out():
    error = refused("FG-EVAL-004", "labels", "--data", "trained-labels.jsonl")
    assert "training rows" in error["found"]


@pytest.fixture(autouse=True, scope="module")
def _trained_labels(place):
    from finegraft.training.events import EventLog
    from finegraft.training.tasks import TASKS

    config = build(
        {
            "task": "classification",
            "model": str(place / "bert"),
            "data": str(place / "labelled.jsonl"),
        }
    )
    examples = TASKS.get("classification").check(config, EventLog()).sides[0].select([0, 1])
    pairs = zip(examples.texts, examples.labels, strict=True)
    lines(place / "trained-labels.jsonl", [{"text": t, "label": label} for t, label in pairs])


def test_spans_are_measured_as_by_their_training(place):
    from test_training_tags import rows as marked

    lines(place / "marked.jsonl", marked())
    values = {"task": "token_classification", "model": str(place / "bert"), "dtype": "float32"}
    values |= {"data": str(place / "marked.jsonl"), "output": str(place / "spans")}
    result = train(build({**values, "learning_rate": 1e-2, "num_train_epochs": 5}))
    found = evaluated("spans")["metrics"]
    assert 0 < result.metrics["f1"] < 1 or result.metrics["f1"] == found["f1"]["value"] == 1
    for name in ("f1", "precision", "recall"):
        assert found[name]["value"] == pytest.approx(result.metrics[name])
        low, high = found[name]["interval"]
        assert low <= found[name]["value"] <= high


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("FG-EVAL-006", ["--vs", "base"]),
        ("FG-EVAL-008", ["--metrics", "chrf"]),
        ("FG-EVAL-008", ["--scorer", "letters.py"]),
    ],
)
def test_options_of_answers_are_refused_for_classifiers(code, words):
    refused(code, "labels", *words)


def test_a_classifier_against_itself_does_not_differ():
    found = evaluated("labels", "--vs", "labels")["metrics"]
    assert found["accuracy"]["difference"] == 0 and found["accuracy"]["change"] == "unclear"
