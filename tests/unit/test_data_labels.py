"""Columns are found, labels get ids, and no text is on both sides of a split."""

from __future__ import annotations

import pytest

from finegraft.core.errors import DataError
from finegraft.data import held_out, labels
from finegraft.data.labels import CLASSES, SEVERAL, VALUES, Columns, Examples


def examples(values, texts=None):
    texts = texts or [f"text {i}" for i in range(len(values))]
    return Examples(texts, None, list(values), list(range(1, len(values) + 1)), "rows.jsonl")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "label": 1}, Columns("text", "label")),
        ({"id": 1, "Review": "a", "Sentiment": "x"}, Columns("Review", "Sentiment")),
        (
            {"premise": "a", "hypothesis": "b", "label": 0},
            Columns("premise", "label", "hypothesis"),
        ),
        (
            {"question1": "a", "question2": "b", "target": 0},
            Columns("question1", "target", "question2"),
        ),
        ({"words": "a", "intent": "x"}, Columns("words", "intent")),
        ({"text": "a", "polarity": "x"}, Columns("text", "polarity")),
    ],
)
def test_columns_are_guessed(row, expected):
    assert labels.columns([row]) == expected


def test_given_columns_win():
    row = {"text": "a", "label": 1, "title": "b", "topic": 2}
    assert labels.columns([row], text="title", label="topic") == Columns("title", "topic")
    found = labels.columns([row], text="title", pair="text")
    assert found == Columns("title", "label", "text")


def test_a_column_that_is_not_there():
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-002.*'lable'.*--label-column label"):
        labels.columns([{"text": "a", "label": 1}], label="lable")


def test_nothing_to_guess():
    with pytest.raises(DataError, match=r"FG-CLASS-003.*\(text, b, c\).*hold the label"):
        labels.columns([{"text": 1, "b": 2, "c": 3}])
    with pytest.raises(DataError, match=r"FG-CLASS-003.*hold the text"):
        labels.columns([{"a": "x", "b": "y", "label": 1}])


def test_rows_without_text_or_label_are_named():
    rows = [{"text": "a", "label": 1}, {"text": " ", "label": 1}, {"text": None, "label": None}]
    which = Columns("text", "label")
    with pytest.raises(DataError, match=r"FG-CLASS-004: f: rows 2, 3 have no text in .*'text'"):
        labels.read(rows, which, "f")
    rows = [{"text": "a", "label": ""}, {"text": "b", "label": 0}]
    with pytest.raises(DataError, match=r"FG-CLASS-005: f: row 1 has no label"):
        labels.read(rows, which, "f")
    many = [{"text": "", "label": 1}] * 20
    with pytest.raises(DataError, match=r"rows 1, 2, .*8 and 12 more have"):
        labels.read(many, which)


@pytest.mark.parametrize(
    ("values", "problem", "names", "encoded"),
    [
        (["b", "a", "b"], CLASSES, ("a", "b"), [1, 0, 1]),
        ([2, 0, 10], CLASSES, ("0", "2", "10"), [1, 0, 2]),
        (["10", "9"], CLASSES, ("9", "10"), [1, 0]),
        ([1.0, 0.0], CLASSES, ("0", "1"), [1, 0]),
        ([True, False], CLASSES, ("false", "true"), [1, 0]),
        ([0.5, 1, "2"], VALUES, (), [0.5, 1.0, 2.0]),
        ([["x"], [], ["y", "x"]], SEVERAL, ("x", "y"), [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
        ([[1, 0, 0], [0, 1, 0]], SEVERAL, ("0", "1", "2"), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    ],
)
def test_the_problem_comes_from_the_labels(values, problem, names, encoded):
    found = labels.make(examples(values))
    assert (found.problem_type, found.names) == (problem, names)
    assert found.encode(examples(values)) == encoded
    assert found.count == (len(names) or 1)


def test_several_labels_in_one_text_when_asked_for():
    found = labels.make(examples(["a|b", "b; c"]), SEVERAL)
    assert found.names == ("a", "b", "c")
    encoded = found.encode(examples(["a|b", "b; c"]))
    assert encoded == [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    assert found.counts(encoded) == {"a": 1, "b": 2, "c": 1}


def test_names_for_numbers_and_an_order_for_names():
    found = labels.make(examples([0, 1, 1]), names=["bad", "good"])
    assert found.names == ("bad", "good") and found.encode(examples([1, "bad"])) == [1, 0]
    found = labels.make(examples(["good", "bad"]), names=["good", "so-so", "bad"])
    assert found.encode(examples(["bad"])) == [2] and found.counts([2, 2]) == {
        "good": 0,
        "so-so": 0,
        "bad": 2,
    }
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-006.*bad, good.*--class-names a,b"):
        labels.make(examples(["a", "b"]), names=["bad", "good"])


def test_an_unknown_label_is_told_with_its_row():
    found = labels.make(examples(["positive", "negative"]))
    with pytest.raises(
        DataError, match=r"(?s)FG-CLASS-007: rows.jsonl, row 2: .*'postive'.*'positive'"
    ):
        found.encode(examples(["negative", "postive"]))


def test_one_class_and_too_many():
    with pytest.raises(DataError, match=r"FG-CLASS-008: every row has the same label, 'x'"):
        labels.make(examples(["x", "x"]))
    with pytest.raises(DataError, match=r"FG-CLASS-008: no row has a label"):
        labels.make(examples([[], []]))
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-009: 100 different labels.*regression"):
        labels.make(examples([f"sentence {i}" for i in range(100)]))


def test_labels_of_another_kind():
    with pytest.raises(DataError, match=r"FG-CLASS-010: .*row 2: 'high' is not a number"):
        labels.make(examples([1.5, "high"]), VALUES)
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-010: .*row 1: \['a'\].*multi_label"):
        labels.make(examples([["a"], "b"]), CLASSES)


def test_a_split_is_stratified_and_repeatable():
    values = [0] * 80 + [1] * 20
    parts = held_out.split(examples(values), values, 0.25, seed=1)
    assert sorted(parts.train + parts.held) == list(range(100))
    assert [sum(values[i] == c for i in parts.held) for c in (0, 1)] == [20, 5]
    assert parts == held_out.split(examples(values), values, 0.25, seed=1)
    assert parts.held != held_out.split(examples(values), values, 0.25, seed=2).held


def test_a_text_is_on_one_side_only():
    texts = ["Good  film", "good film ", "ＧＯＯＤ film"] * 5 + [f"other {i}" for i in range(15)]
    values = [0, 0, 1] * 5 + [0, 1, 1] * 5
    given = examples(values, texts)
    for seed in range(8):
        parts = held_out.split(given, values, 0.3, seed)
        keys = given.keys()
        assert not {keys[i] for i in parts.train} & {keys[i] for i in parts.held}
        assert (parts.repeated, parts.contradictory) == (1, 1)


def test_a_class_of_one_text_is_trained_and_told():
    values = [0] * 10 + [1]
    parts = held_out.split(examples(values), values, 0.5, 0)
    assert 10 in parts.train and parts.only_trained == [1]


@pytest.mark.parametrize("encoded", [[i / 7 for i in range(50)], [[1.0, 0.0], [0.0, 1.0]] * 25])
def test_values_and_combinations_are_split_too(encoded):
    parts = held_out.split(examples(encoded), encoded, 0.2, 3)
    assert len(parts.held) == 10 and len(parts.train) == 40


def test_training_rows_that_are_held_out():
    held = examples([0], ["SEEN text"])
    assert held_out.unseen(examples([0, 1], ["seen  text", "new"]), held) == [1]


def test_weights_make_classes_count_alike():
    encoded = [0] * 30 + [1] * 10
    weights = held_out.class_weights(encoded, 3)
    assert weights[0] * 30 == weights[1] * 10 == 20 and weights[2] == 0
    assert held_out.class_weights([[1.0, 0.0]] * 3 + [[0.0, 0.0]], 2) == [1 / 3, 1.0]
