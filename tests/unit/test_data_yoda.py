"""The quickstart's rows: the same every time, no sentence twice, and a rule to learn."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import pytest

from finegraft.core.errors import ConfigError
from finegraft.data.yoda import rows, split


def test_rows_are_pinned() -> None:
    made = rows()
    assert len(made) == 720 and made == rows(720, 3407)
    assert made[0] == PINNED_FIRST
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert digest[:16] == PINNED_DIGEST
    assert rows(720, 1) != made
    assert rows(100) == made[:100]


def test_no_sentence_twice_and_none_in_both_halves() -> None:
    train, heldout = split(rows())
    assert (len(train), len(heldout)) == (660, 60)
    prompts = [row["prompt"] for row in train + heldout]
    assert len(set(prompts)) == 720
    double = [{"prompt": "a", "completion": "b"}] * 3
    assert split(double, 1) == ([], double[:1])


def reorder(sentence: str) -> str:
    """The rule, written a second time from the sentence's surface."""
    the = r"the \w+ \w+"
    body = sentence[:-1]
    body = body[0].lower() + body[1:]
    for pattern, order, tail in (
        (rf"did ({the}) (\w+) ({the})", "{2}, did {0} {1}?", "Hmm?"),
        (rf"you (must|will) (\w+ {the})", "{1}, you {0}.", "Herh herh herh."),
        (rf"({the}) (did not \w+) ({the})", "{2}, {0} {1}.", "No, hmm."),
        (r"(the .*) is (\w+)", "{1}, {0} is.", "Yes, hrrrm."),
        (rf"({the}) (\w+) (\w+ {the})", "{2}, {0} {1}.", "Yes, hrrrm."),
        (rf"({the}) (\w+) ({the})", "{2}, {0} {1}.", "Yes, hrrrm."),
    ):
        found = re.fullmatch(pattern, body)
        if found:
            said = order.format(*found.groups())
            return f"{said[0].upper()}{said[1:]} {tail}"
    raise AssertionError(sentence)


def test_every_answer_follows_from_its_sentence() -> None:
    for row in rows(4000):
        assert row["completion"] == reorder(row["prompt"])


def test_every_heldout_word_was_met_in_training() -> None:
    train, heldout = split(rows())
    met = Counter(word for row in train for word in re.findall(r"\w+", row["completion"].lower()))
    needed = {word for row in heldout for word in re.findall(r"\w+", row["completion"].lower())}
    assert min(met[word] for word in needed) >= 10


def test_out_of_range() -> None:
    assert len(rows(4800)) == 4800
    for count in (0, 4801):
        with pytest.raises(ConfigError, match=f"FG-DATA-013.*count is {count}"):
            rows(count)
    for heldout in (0, 10):
        with pytest.raises(ConfigError, match=f"FG-DATA-013.*heldout is {heldout} of 10"):
            split(rows(10), heldout)


PINNED_FIRST = {
    "prompt": "The hungry cat walked around the dark road.",
    "completion": "Around the dark road, the hungry cat walked. Yes, hrrrm.",
}
PINNED_DIGEST = "f61fb4dc44b0a2e3"
