"""Rows as training sees them, a few at a time, for people to look at.

What: ``rows`` picks rows out of a specification without reading the rest, ``shown`` renders one and
says of every token whether it is trained, read or cut off. How: ``prepare`` makes the ids and
labels, as in training; the tokens beyond them come from ``render``, whose row ``prepare`` cuts.
Constraint: there is no second way of rendering here. Trade-off: a row is rendered twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import DataError
from finegraft.data import rows as layouts
from finegraft.data import sources
from finegraft.data.conversation import Message
from finegraft.data.prepare import IGNORE, prepare
from finegraft.data.render import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ, TRAINED, CUT = "read", "trained", "cut"
_LOOKED_AT = 100  # rows that tell the layout


@dataclass(frozen=True)
class Picked:
    """A row as a conversation. ``place`` is its number over all files, 1-based."""

    place: int
    source: str
    number: int
    format: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Shown:
    """A rendered row.

    Attributes:
        pieces: Text of each token.
        states: ``trained``, ``read`` or ``cut`` for each token.
        parts: Stretches of one state, each with its text.
        dropped: Nothing in what is left of the row can be learnt, so training leaves it out.
    """

    ids: list[int]
    pieces: list[str]
    states: list[str]
    parts: list[tuple[str, str]]
    dropped: bool

    @property
    def trained(self) -> int:
        """Tokens that carry a label."""
        return self.states.count(TRAINED)

    @property
    def cut(self) -> int:
        """Tokens beyond the longest length."""
        return self.states.count(CUT)


def rows(
    spec: sources.Spec,
    mapping: Mapping[str, str] | None = None,
    *,
    first: int = 1,
    count: int = 3,
) -> list[Picked]:
    """Return ``count`` rows from number ``first`` on, counted over all files.

    Raises:
        ConfigError, DataError: those of reading; FG-DATA-039, fewer rows than ``first``.
    """
    picked: list[Picked] = []
    before = 0
    for part in sources.parts(spec):
        located = sources.iter_located([part], mapping)
        head = list(itertools.islice(located, _LOOKED_AT))
        name, layout = layouts.detect([at.row for at in head])
        for place, at in enumerate(itertools.chain(head, located), before + 1):
            before = place
            if place >= first:
                told = [f"{at.source}, row {at.number}"]
                messages = layouts.conversations([at.row], layout, told)[0]
                tools = layouts.tools_of([at.row], told) or [None]
                picked.append(Picked(place, at.source, at.number, name, messages, tools[0]))
            if len(picked) == count:
                return picked
    if not picked:
        raise no_row(first, before, spec)
    return picked


def no_row(wanted: int, rows: int, spec: sources.Spec) -> DataError:
    """A row was asked for that is not there."""
    return DataError(
        "FG-DATA-039",
        f"there is no row {wanted} in {sources.describe(spec)}",
        allowed=f"1 to {rows}",
        fix=f"--row {rows}",
    )


def shown(
    row: Picked,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completion_only: bool | None = None,
) -> Shown:
    """Render one row and say what becomes of each token.

    Raises:
        DataError: those of ``render``, with the row.
    """
    told = f"{row.source}, row {row.number}"
    settings: dict[str, Any] = {
        "max_length": max_length,
        "completion_only": completion_only,
        "tools": [row.tools],
        "names": [told],
    }
    try:
        prepared = prepare([row.messages], tokenizer, **settings)
        labels, dropped = prepared.labels[0], False
    except DataError as error:
        if error.code != "FG-DATA-009":
            raise
        labels, dropped = [], True
    whole = render(
        row.messages, tokenizer, completion_only=completion_only, tools=row.tools
    ).input_ids
    kept = min(len(whole), max_length)
    labels = labels or [IGNORE] * kept
    states = [READ if label == IGNORE else TRAINED for label in labels]
    states += [CUT] * (len(whole) - kept)
    return assembled(whole, states, tokenizer, dropped)


def assembled(
    ids: list[int], states: list[str], tokenizer: PreTrainedTokenizerBase, dropped: bool = False
) -> Shown:
    """Tokens and what becomes of each, with their text."""
    parts = [(state, _decoded(ids[where], tokenizer)) for state, where in _stretches(states)]
    return Shown(ids, pieces(ids, tokenizer), states, parts, dropped)


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; of one that is a part of a character only, its name."""
    out = []
    for i in ids:
        text = _decoded([i], tokenizer)
        out.append(str(tokenizer.convert_ids_to_tokens(i)) if "\ufffd" in text else text)
    return out


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, with the space that SentencePiece drops at the start of a text."""
    text = str(tokenizer.decode(ids))
    first = str(tokenizer.convert_ids_to_tokens(ids[0]))
    return " " + text if first.startswith("\u2581") and not text.startswith(" ") else text


def _stretches(states: list[str]) -> Iterator[tuple[str, slice]]:
    at = 0
    for state, members in itertools.groupby(states):
        size = len(list(members))
        yield state, slice(at, at + size)
        at += size
