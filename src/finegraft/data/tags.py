"""Tags of words: from spans of characters to one tag a token, and back.

What: ``words`` cuts a text into words for any tokenizer with offsets, ``encode`` gives each its tag
(``B-type`` where a span begins, ``I-type`` inside, ``O`` elsewhere), ``chunks`` reads spans off
tags. How: a word begins after a space and at punctuation; its first sub-token carries the tag, its
others none. Constraint: the same cutting serves training, measuring and prediction. Trade-off: a
span that ends inside a word cannot be learnt; it is counted and left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finegraft.core.errors import ConfigError, DataError, did_you_mean
from finegraft.data.labels import Examples

OUTSIDE = "O"
IGNORED = -100  # tokens without a tag, as the loss of torch and the trainers skip it
PREFIXED = re.compile(r"([BIESLU])-(.+)")
NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # Han and kana

_ENDS = ("E", "L", "S", "U")  # of IOBES and BILOU: this word is the span's last one


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (not included) of a text are a ``label``."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Word:
    """A word as a tokenizer sees it: its first token's place, and its characters."""

    token: int
    start: int
    end: int


def chunks(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Find the spans that tags stand for.

    A span goes on with ``I-`` of its own type; ``I-`` without one before it begins a span, as in
    conlleval. IOB, IOB2, IOBES and BILOU are read; tags without a prefix are spans of equal tags.

    Returns:
        First word, one past the last word, and type of every span.

    Source: CoNLL-2003 shared task, arXiv:cs/0306050.
    """
    found: list[tuple[int, int, str]] = []
    start, kind, ended = 0, None, True
    for i, tag in enumerate([*tags, OUTSIDE]):
        split = PREFIXED.fullmatch(tag)
        prefix, now = split.groups() if split else ("", None if tag == OUTSIDE else tag)
        goes_on = not ended and now == kind and prefix in ("I", "E", "L", "")
        if kind is not None and not goes_on:
            found.append((start, i, kind))
        if not goes_on:
            start, kind = i, now
        ended = kind is None or prefix in _ENDS
    return found


def type_of(tag: str) -> str | None:
    """The type that a tag is of, None for ``O``."""
    split = PREFIXED.fullmatch(tag)
    return split.group(2) if split else None if tag == OUTSIDE else tag


def names_for(examples: Examples, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The tags of the types in ``examples``: ``O``, then ``B-`` and ``I-`` of each.

    Args:
        given: Types or tags in the order wanted; None: those found, by name.

    Raises:
        DataError: FG-CLASS-038, no span anywhere.
    """
    counted = counts(examples)
    if not counted:
        raise DataError(
            "FG-CLASS-038",
            f"{examples.source}: no word of any row is marked",
            allowed="rows of which some have a span, or a tag that is not O",
            fix="name the right column: --label-column <column>",
        )
    kinds = dict.fromkeys(filter(None, map(type_of, given))) if given else sorted(counted)
    names = (OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))
    require_known(examples, names)
    return names


def counts(examples: Examples) -> dict[str, int]:
    """Spans of each type."""
    found = Counter(span.label for spans in examples.labels for span in spans)
    return {kind: found[kind] for kind in sorted(found)}


def require_known(examples: Examples, names: Sequence[str]) -> None:
    """Prove that ``names`` has the tags of every span.

    Raises:
        DataError: FG-CLASS-037, with the row.
    """
    kinds = list(dict.fromkeys(filter(None, map(type_of, names))))
    for number, spans in zip(examples.numbers, examples.labels, strict=True):
        unknown = next((span.label for span in spans if span.label not in kinds), None)
        if unknown is not None:
            raise DataError(
                "FG-CLASS-037",
                f"{examples.source}, row {number}: unknown tag '{unknown}'",
                allowed=", ".join(kinds[:40]),
                fix=f"correct it ({did_you_mean(unknown, kinds)}), or train with rows that have it",
            )


def _is_word(character: str) -> bool:
    if character.isascii():
        return character.isalnum() or character == "_"
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def beginnings(text: str) -> set[int]:
    """Characters at which a word begins: after a space, at and after punctuation, Han and kana."""
    found, joins = set(), False
    for i, character in enumerate(text):
        if character.isspace():
            joins = False
            continue
        alone = not _is_word(character) or NO_SPACES.match(character) is not None
        if alone or not joins:
            found.add(i)
        joins = not alone
    return found


def require_offsets(tokenizer: Any) -> None:
    """Prove that a tokenizer can say which characters its tokens stand for.

    Raises:
        ConfigError: FG-CLASS-040.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "FG-CLASS-040",
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for",
            allowed="a tokenizer with a tokenizer.json",
            fix="use another model, or convert its tokenizer with transformers' "
            "convert_slow_tokenizer",
        )


def words(text: str, offsets: Sequence[tuple[int, int]]) -> list[Word]:
    """Cut a text into words that begin with a token.

    Args:
        offsets: First and one past the last character of each token; special tokens are empty.

    Returns:
        Words in the order of the text. A token that holds several words is one.
    """
    begin, found = beginnings(text), list[Word]()
    for place, (start, end) in enumerate(offsets):
        while start < end and text[start].isspace():  # of tokens that carry the space before them
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if start == end:
            continue
        new = start in begin and (not found or start > found[-1].start)
        if new:
            found.append(Word(place, start, end))
        elif found:  # without one before it, it is the rest of a word that was cut off
            last = found[-1]
            found[-1] = Word(last.token, last.start, max(last.end, end))
    return found


def encode(
    spans: Sequence[Span], seen: Sequence[Word], ids: Mapping[str, int], length: int
) -> tuple[list[int], int]:
    """Return one tag id a token, and how many spans do not begin and end with words.

    Such a span's words get no tag, and neither do those of a span that was cut with the text:
    nothing wrong is taught.

    Args:
        seen: From ``words``.
        ids: Of the tags, ``O`` and ``B-`` and ``I-`` of every type.
        length: Tokens of the row.
    """
    tags, odd = [IGNORED] * length, 0
    for word in seen:
        tags[word.token] = ids[OUTSIDE]
    cut = (seen[0].start, seen[-1].end) if seen else (0, 0)
    for span in spans:
        inside = [word for word in seen if word.start < span.end and word.end > span.start]
        whole = inside and (inside[0].start, inside[-1].end) == (span.start, span.end)
        odd += not whole and cut[0] <= span.start and span.end <= cut[1]
        for i, word in enumerate(inside):
            tag = ids[f"{'I' if i else 'B'}-{span.label}"]
            tags[word.token] = tag if whole else IGNORED
    return tags, odd
