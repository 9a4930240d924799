"""Conversations that a model and its export are both asked.

What: held-out rows of the run where there are some, else built-in conversations, as token ids with
the places that are compared. How: ``data.render`` makes the ids, as for training. Constraint: the
same rows every time, so that two reports can be compared. Trade-off: at most 8 rows and 16 tokens
of each, which a CPU answers in seconds; a fault shows in all of them or in none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finegraft.core.errors import FinegraftError
from finegraft.data import labels, mix, render
from finegraft.data.sources import read_rows
from finegraft.export._origin import Origin

logger = logging.getLogger(__name__)

ROWS, TOKENS, LONGEST = 8, 16, 512
_TURNS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "Write a haiku about rain.",
        "Soft rain on the roof,\nthe garden drinks in silence,\nmorning smells of earth.",
    ),
    ("How do I add two numbers in Python?", "```python\ndef add(a, b):\n    return a + b\n```"),
    ("Übersetze: naïve café, 東京 😀", "naive coffee house, Tokyo 😀"),
    ("  Count   to five.\n\nOne per line:\t", "1\n2\n3\n4\n5"),
)
TEXTS = (
    "It was good, and I would buy it again.",
    "The worst film that I have seen in years!",
    "  naïve café, 東京 😀\t",
    "A parcel arrived on Monday; nobody was at home.",
)
_LONG = "The train left the old station at nine and crossed the river before the sun came out. "


@dataclass(frozen=True)
class Row:
    """One conversation or text.

    Attributes:
        messages: The whole conversation; empty for a text.
        text: What a report shows of it, or the text itself.
        ids: All tokens, cut to what is compared.
        scored: Places in ``ids`` whose probability is compared, never 0; empty for a text.
    """

    messages: tuple[dict[str, Any], ...]
    text: str
    ids: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The conversation without the answer."""
        return list(self.messages[:-1] if self._answered else self.messages)

    @property
    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"


def rows_for(origin: Origin, new_tokens: Sequence[str] = ()) -> tuple[list[Row], str]:
    """Return rows for a generating model, and where they are from.

    Args:
        new_tokens: Tokens that training added, to be among what is asked.
    """
    found, where = _held_out(origin), "held-out rows of the run"
    tokenizer = origin.tokenizer
    if not found:
        found, where = _built_in(tokenizer), "built-in prompts"
    if new_tokens:
        said = " ".join(new_tokens[:8])
        found = [_conversation(said, said, tokenizer), *found]
    made = [_row(messages, tokenizer) for messages in found[:ROWS]]
    return [row for row in made if row.scored], where


def texts_for(origin: Origin) -> tuple[list[Row], str]:
    """Return rows for a classifier, and where they are from."""
    texts, where = _held_out_texts(origin), "rows of the run"
    if not texts:
        texts, where = list(TEXTS), "built-in texts"
    made = []
    for text in texts[:ROWS]:
        ids = origin.tokenizer(text, truncation=True)["input_ids"][:LONGEST]
        made.append(Row((), text, tuple(ids), ()))
    return made, where


def _conversation(question: str, answer: str, tokenizer: Any) -> list[dict[str, Any]]:
    if not tokenizer.chat_template:
        return [{"role": "text", "content": f"{question}\n{answer}"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _built_in(tokenizer: Any) -> list[list[dict[str, Any]]]:
    found = [_conversation(*turn, tokenizer) for turn in _TURNS]
    if tokenizer.chat_template:
        found.append([*found[0], *_conversation("And of Italy?", "Rome.", tokenizer)])
    # positions far apart, where a wrong rotary scaling shows
    return [_conversation(_LONG * 12 + "When did it leave?", "At nine.", tokenizer), *found]


def _held_out(origin: Origin) -> list[list[dict[str, Any]]]:
    """Held-out conversations of the run; none where the files are gone or changed."""
    settings = origin.settings
    if settings is None or not (settings.eval_data or settings.eval_fraction):
        return []
    try:
        found = mix.read(settings.eval_data or settings.data, settings.map).conversations
    except FinegraftError as error:
        logger.warning("the held-out rows cannot be read (%s); asking built-in prompts", error.code)
        return []
    if not settings.eval_data:
        found = found[-max(1, round(len(found) * settings.eval_fraction)) :]
    return [[dict(message) for message in messages] for messages in found[:ROWS]]


def _held_out_texts(origin: Origin) -> list[str]:
    settings = origin.settings
    if settings is None:
        return []
    try:
        read = read_rows(settings.eval_data or settings.data, settings.map)
        column, pair = labels.text_columns(
            list(read[0]), settings.text_column, settings.text_pair_column
        )
        return [] if pair else labels.texts_of(read[-ROWS:], column)
    except FinegraftError as error:
        logger.warning("the rows cannot be read (%s); asking built-in texts", error.code)
        return []


def _row(messages: list[dict[str, Any]], tokenizer: Any) -> Row:
    rendered = render.render(messages, tokenizer)
    scored = [i for i, learnt in enumerate(rendered.trained) if learnt and 0 < i < LONGEST]
    scored = scored[:TOKENS]
    last = scored[-1] + 1 if scored else 0
    shown = str(messages[-2 if len(messages) > 1 else -1].get("content"))
    return Row(tuple(messages), shown, tuple(rendered.input_ids[:last]), tuple(scored))
