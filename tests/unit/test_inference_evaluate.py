"""Measures equal their libraries' own results and known answers; intervals hold what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finegraft.core import intervals
from finegraft.core.errors import ConfigError, DataError
from finegraft.inference import evaluate
from finegraft.inference.evaluate import METRICS, Answered
from finegraft.inference.evaluate._compare import same_tokens
from finegraft.training import entities, metrics

REFERENCES = [
    "the cat sat on the mat",
    "a dog runs through the park",
    "Wir fahren heute nach Köln.",
    "42",
    "it is raining again this morning",
]
ANSWERS = [
    "the cat sat on a mat",
    "the dog ran in the park",
    "Wir fahren morgen nach Köln.",
    " 42\n",
    "sunny",
]
OTHERS = ["no", "a dog", "Wir", "41", "it is raining again this morning"]


def answered(answers, losses=None):
    return Answered([f"question {i}" for i in range(len(answers))], REFERENCES, answers, losses)


def value(name, rows):
    return evaluate.compare({name: METRICS.get(name)}, rows)[name]["value"]


def test_bleu_and_chrf_are_sacrebleus():
    import sacrebleu

    rows = answered(ANSWERS)
    assert value("bleu", rows) == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert value("chrf", rows) == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score)
    each = evaluate.each_row(METRICS.get("chrf"), rows)
    for got, want, score in zip(ANSWERS, REFERENCES, each, strict=True):
        assert score == pytest.approx(sacrebleu.sentence_chrf(got, [want]).score)


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_googles(kind):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    pairs = zip(ANSWERS, REFERENCES, strict=True)
    expected = np.mean([scorer.score(want, got)[kind].fmeasure for got, want in pairs])
    assert value(kind.lower(), answered(ANSWERS)) == pytest.approx(expected)


def test_known_answers():
    rows = answered(ANSWERS)
    assert value("exact_match", rows) == 1 / 5
    assert value("chrf", answered(REFERENCES)) == pytest.approx(100)
    assert value("bleu", answered(REFERENCES)) == pytest.approx(100)
    # two of three words the same in both: F1 is 2 * (2/3 * 2/3) / (4/3)
    one = Answered(["q"], ["a b c"], ["a b d"])
    assert value("rouge1", one) == pytest.approx(2 / 3)
    assert value("rouge2", one) == pytest.approx(1 / 2)


def test_loss_weighs_tokens_and_perplexity_is_its_power():
    rows = answered(ANSWERS, np.array([[2.0, 1], [0, 3], [4, 2], [1, 1], [3, 3]]))
    assert value("loss", rows) == pytest.approx(1.0)
    assert value("perplexity", rows) == pytest.approx(math.e)
    with pytest.raises(DataError, match="FG-EVAL-012"):
        value("loss", answered(ANSWERS))


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_keeps_the_contract(name):
    metric = METRICS.get(name)
    rows = answered(ANSWERS, np.ones((5, 2)))
    sums = metric.sums(rows)
    assert sums.shape[0] == 5 and sums.dtype == np.float64
    each = evaluate.each_row(metric, rows)
    assert each == [metric.total(row) for row in sums]
    if metric.reads == "answers":
        best = metric.total(metric.sums(answered(REFERENCES)).sum(0))
        assert best >= metric.total(sums.sum(0))
        assert (metric.better == "more") and best > 0.6  # rouge of "42" and of two words counts 0
    low, high = evaluate.compare({name: metric}, rows)[name]["interval"]
    assert low <= metric.total(sums.sum(0)) <= high
    assert metric.about


def test_a_row_without_an_answer_has_a_loss_and_nothing_else():
    rows = Answered(["q", ""], ["a", None], ["a", ""], np.array([[1.0, 1], [3, 1]]))
    assert value("loss", rows) == 2.0
    assert value("exact_match", rows) == 1.0
    assert evaluate.each_row(METRICS.get("exact_match"), rows) == [1.0, None]


def test_wilson_is_known_and_never_empty():
    # R: prop.test(60, 100, correct=FALSE)
    assert intervals.wilson(0.6, 100) == pytest.approx((0.5020026, 0.6905987), abs=1e-6)
    assert intervals.wilson(0.0, 60)[1] > 0.05
    assert intervals.wilson(1.0, 60)[0] < 0.95


def test_the_bootstrap_of_a_mean_is_that_of_the_normal_distribution():
    dice = np.random.default_rng(3)
    values = dice.normal(5, 2, size=400)
    sums = np.stack([values, np.ones(400)], axis=1)
    low, high = intervals.bootstrap(sums, lambda row: row[0] / row[1])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert intervals.bootstrap(sums, lambda row: row[0] / row[1]) == (low, high)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    dice = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        sums = np.stack([dice.exponential(1.0, 60), np.ones(60)], axis=1)
        low, high = intervals.bootstrap(sums, lambda row: row[0] / row[1], draws=200)
        held += low <= 1.0 <= high
    assert 0.87 <= held / 200 <= 0.99


def test_a_difference_is_a_paired_one():
    """Rows that differ much among each other and by 0.1 between the models."""
    dice = np.random.default_rng(7)
    values = dice.normal(0, 10, size=50)
    ones = np.ones(50)
    better, worse = (np.stack([v, ones], axis=1) for v in (values + 0.1, values))
    low, high = intervals.bootstrap_difference(better, worse, lambda row: row[0] / row[1])
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_two_models_are_compared_on_the_same_rows():
    losses = np.array([[1.0, 2], [1, 2], [1, 2], [1, 2], [1, 2]])
    chosen = {name: METRICS.get(name) for name in ("loss", "exact_match", "chrf")}
    found = evaluate.compare(chosen, answered(REFERENCES, losses), answered(OTHERS, 2 * losses))
    # twice the tokens: the two cut text differently, and nats a token are not one unit
    assert "difference" not in found["loss"] and "change" not in found["loss"]
    found = evaluate.compare(
        chosen, answered(REFERENCES, losses), answered(OTHERS, losses * [2, 1])
    )
    assert found["loss"]["difference"] == pytest.approx(-0.5)
    assert found["loss"]["change"] == "better"
    assert found["exact_match"]["difference"] == pytest.approx(4 / 5)
    assert found["chrf"]["change"] == "better"
    back = evaluate.compare(chosen, answered(OTHERS, losses), answered(REFERENCES, losses))
    assert back["chrf"]["change"] == "worse" and back["loss"]["change"] == "unclear"


def test_losses_of_other_tokens_are_not_the_same():
    a, b = np.ones((5, 2)), np.ones((5, 2))
    assert same_tokens(answered(ANSWERS, a), answered(OTHERS, b))
    b[3, 1] = 2
    assert not same_tokens(answered(ANSWERS, a), answered(OTHERS, b))


def test_pairs_count_wins_ties_and_losses():
    both = list(ANSWERS)
    both[3] = "42"  # white space aside the same
    found = evaluate.pairwise(answered(ANSWERS), answered([*OTHERS[:3], "42", OTHERS[4]]))
    assert (found["wins"], found["ties"], found["losses"]) == (3, 1, 1)
    assert found["win_rate"] == 0.7
    low, high = found["interval"]
    assert low < 0.5 < 0.7 < high < 1
    assert evaluate.pairwise(answered(ANSWERS), answered(ANSWERS))["ties"] == 5


def test_the_rows_that_changed_most():
    found = evaluate.changed(METRICS.get("chrf"), answered(ANSWERS), answered(OTHERS), 2)
    scores = evaluate.each_row(METRICS.get("chrf"), answered(ANSWERS))
    others = evaluate.each_row(METRICS.get("chrf"), answered(OTHERS))
    gaps = [a - b for a, b in zip(scores, others, strict=True)]
    assert found["gains"][0] == int(np.argmax(gaps)) and len(found["gains"]) == 2
    assert found["losses"] == [4]


SCORER = "def score(prompt, answer, reference):\n    return len(answer) / len(reference)\n"


def test_a_scorer_of_ones_own(tmp_path):
    (tmp_path / "long.py").write_text(SCORER)
    metric = evaluate.from_file(tmp_path / "long.py")
    expected = np.mean([len(a) / len(r) for a, r in zip(ANSWERS, REFERENCES, strict=True)])
    assert metric.total(metric.sums(answered(ANSWERS)).sum(0)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file"),
        ("def scores(): pass", "no function score"),
        ("def score(:", r"line 1"),
        ("import no_such_module_here", "ModuleNotFoundError"),
    ],
)
def test_a_scorer_that_cannot_be_used(tmp_path, text, said):
    path = tmp_path / "my.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"FG-EVAL-013(.|\n)*{said}"):
        evaluate.from_file(path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", r"ZeroDivisionError: division by zero \(line 2\)"),
        ("return None", "TypeError"),
        ("return float('nan')", "gave nan for row 1"),
        ("return 'good'", "ValueError"),
    ],
)
def test_a_scorer_that_fails_names_the_row(tmp_path, body, said):
    (tmp_path / "my.py").write_text(f"def score(prompt, answer, reference):\n    {body}\n")
    metric = evaluate.from_file(tmp_path / "my.py")
    with pytest.raises(ConfigError, match=f"FG-EVAL-014(.|\n)*{said}"):
        metric.sums(answered(ANSWERS))


def test_a_missing_library_is_told():
    with pytest.raises(ConfigError, match=r"FG-EVAL-011(.|\n)*finegraft\[eval\]"):
        evaluate.require_package("bleu", "no-such-library")
    evaluate.require_package("rouge1", "rouge-score")


def test_questions_cut_the_last_answer_off():
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    raw = {"role": "text", "content": "words"}
    call = {"role": "assistant", "content": None, "tool_calls": []}
    rows = evaluate.questions([[user, said], [user, said, user, said], [raw], [user], [user, call]])
    assert rows.references == ["Hello", "Hello", None, None, None]
    assert rows.prompts[0] == "Hi"
    assert rows.prompts[1] == "user: Hi\nassistant: Hello\nuser: Hi"
    assert rows.heads[1] == [user, said, user] and rows.heads[2:] == [None, None, None]


# classifiers: the values are those of the training's own measures


def chances(count, labels, seed=0):
    logits = np.random.default_rng(seed).normal(size=(count, labels))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_classes_are_measured_as_in_training():
    true = np.random.default_rng(1).integers(0, 3, 80)
    said = chances(80, 4)  # the fourth label is never true
    found = evaluate.judge_labels("single_label_classification", true, said)
    expected = metrics.classes(true, said.argmax(1), list("abcd"))
    for name in ("accuracy", "macro_f1"):
        assert found[name]["value"] == pytest.approx(expected[name])
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high
    assert found["loss"]["value"] == pytest.approx(-np.log(said[np.arange(80), true]).mean())


def test_several_labels_and_values_are_measured_as_in_training():
    true = np.random.default_rng(1).integers(0, 2, (60, 3)).astype(float)
    said = np.random.default_rng(2).uniform(size=(60, 3))
    found = evaluate.judge_labels("multi_label_classification", true, said)
    expected = metrics.several(true, said >= 0.5, list("abc"))
    for name in ("accuracy", "micro_f1", "macro_f1"):
        assert found[name]["value"] == pytest.approx(expected[name])
    values, guessed = said[:, 0], said[:, 1]
    found = evaluate.judge_labels("regression", values, guessed, values)
    assert found["mse"]["value"] == pytest.approx(metrics.values(values, guessed)["mse"])
    assert found["mae"]["value"] == pytest.approx(metrics.values(values, guessed)["mae"])
    assert found["mse"]["other"] == 0 and found["mse"]["change"] == "worse"


def test_spans_are_measured_as_in_training():
    tags = [["B-x", "I-x", "O", "B-y"], ["O", "B-x", "O", "O"], ["B-y", "O", "B-x", "O"]]
    said = [["B-x", "O", "O", "B-y"], ["O", "B-x", "O", "B-y"], ["B-y", "O", "B-x", "O"]]
    expected = entities.measure(tags, said)
    true, mine = ([set(entities.chunks(row)) for row in rows] for rows in (tags, said))
    found = evaluate.judge_spans(true, mine)
    for name in ("f1", "precision", "recall"):
        assert found[name]["value"] == pytest.approx(expected[name])
