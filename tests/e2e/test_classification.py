"""A real encoder on real reviews, through the command line, from rows to sentences of its own."""

from __future__ import annotations

import json

import pytest
from command_line import finegraft

from finegraft.data import reviews

NAMES = ("negative", "positive")
# The sentences that the document classifies after training, and what its model said.
PLAIN = {
    "It was good.": "positive",
    "Not a fan, don't recommed.": "negative",
    "This is not worth watching even once.": "negative",
}
# A comparison and a pun: this small encoder reads the first as negative (0.50 to 0.79 over four
# learning rates), so one of the two may differ from the document's 66M model.
SUBTLE = {"Better than the first one.": "positive", "This one is a pass.": "positive"}


def write(path, rows):
    lines = [{"text": row["text"], "label": NAMES[row["label"]]} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trained(folder, rows, *words):
    train, held = reviews.split(rows, 500)
    write(folder / "train.jsonl", train)
    write(folder / "held.jsonl", held)
    done = finegraft(
        *("train", "--task", "classification", "--model", "demo-encoder"),
        *("--data", "train.jsonl", "--eval-data", "held.jsonl", "--output", "run"),
        *("--json", *words),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_few_reviews_teach_something_and_predict_agrees(tmp_path):
    """600 rows, two passes: better than the majority, and the saved adapter says the same."""
    result = trained(tmp_path, 600, "--num-train-epochs", "2")
    assert result["metrics"]["accuracy"] > 0.7
    done = finegraft("predict", "run", "--file", "held.jsonl", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)["predictions"]
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    right = sum(one["label"] == row["label"] for one, row in zip(said, rows, strict=True))
    assert right / len(rows) == pytest.approx(result["metrics"]["accuracy"], abs=0.005)


@pytest.mark.slow
def test_two_thousand_reviews_reach_the_goal(tmp_path):
    result = trained(tmp_path, 2000)
    assert result["metrics"]["accuracy"] >= 0.84
    done = finegraft("predict", "run", *PLAIN, *SUBTLE, "--json", cwd=tmp_path)
    said = {one["text"]: one["label"] for one in json.loads(done.stdout)["predictions"]}
    assert {text: said[text] for text in PLAIN} == PLAIN
    assert any(said[text] == label for text, label in SUBTLE.items())
