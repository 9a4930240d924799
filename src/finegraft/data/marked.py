"""Texts with marked spans (names, places, times, numbers), from any layout to one.

What: words with tags, texts with spans and CoNLL files become a text with spans of characters.
How: columns are guessed by name, the layout by what they hold; words are joined by spaces, so that
training sees what a raw text will look like. Constraint: whatever is wrong with a row is said with
its number. Trade-off: the schemes of tags (IOB, IOBES, BILOU) are not kept, only what they mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.errors import DataError
from finegraft.data import labels, mix, sources
from finegraft.data.labels import Examples
from finegraft.data.rows import apply_map
from finegraft.data.tags import NO_SPACES, OUTSIDE, PREFIXED, Span, chunks

_WORDS = ("tokens", "words", "token", "word")
_TAGS = ("tags", "ner_tags", "labels", "ner", "slots", "slot_labels", "tag", "label")
_SPANS = ("entities", "spans", "labels", "label", "annotations", "slots", "ner")
WORD_FILES = (".conll", ".bio", ".iob", ".iob2")
_LINES = (*WORD_FILES, ".tsv", ".txt")  # files of a word and its tag a line


@dataclass(frozen=True)
class Columns:
    """What is read: a text (or words) and spans (or, with ``words``, one tag a word)."""

    text: str
    label: str
    words: bool


def read_rows(spec: sources.Spec, mapping: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of every file of a specification; see ``read_file`` and ``sources.parts``.

    Raises:
        ConfigError: FG-DATA-036, a weight; DataError: as ``read_file``.
    """
    mix.require_no_weights(spec, "token_classification")
    rows: list[dict[str, Any]] = []
    for part in sources.parts(spec):
        for file in sources.files(part):
            rows += apply_map(read_file(file), part.map or mapping or {})
    return rows


def read_file(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of rows; text files hold a word and its tag a line, in CoNLL's way.

    Args:
        path: .conll, .bio, .iob, .iob2, .tsv and .txt: the first column of a line is the word and
            the last its tag, between tabs or spaces; an empty line ends a sentence. Others as in
            ``sources.read_rows``.

    Raises:
        DataError: FG-CLASS-039, a line without word and tag, or no text; those of
            ``sources.read_rows``.
    """
    path = Path(path)
    if path.suffix.lower() not in _LINES or not path.is_file():
        return sources.read_rows(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _bad_line(str(path), f"not UTF-8 ({error.reason})") from error
    if path.suffix.lower() == ".tsv" and lines and _is_header(lines[0]):
        return sources.read_rows(path)
    rows: list[dict[str, Any]] = []
    new = True
    for number, line in enumerate(lines, 1):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or cells[0].startswith("-DOCSTART-"):
            new = True
            continue
        if len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            raise _bad_line(f"{path}, line {number}", repr(line.strip()[:60]))
        if new:
            rows.append({"tokens": [], "tags": []})
        rows[-1]["tokens"].append(cells[0].strip())
        rows[-1]["tags"].append(cells[-1].strip())
        new = False
    if not rows:
        raise _bad_line(str(path), "no words")
    return rows


def _is_header(line: str) -> bool:
    names = [name.strip().lower() for name in line.split("\t")]
    return any(n in ("text", "sentence", *_WORDS) for n in names) and names[-1] in (*_TAGS, *_SPANS)


def _bad_line(where: str, problem: str) -> DataError:
    return DataError(
        "FG-CLASS-039",
        f"{where}: {problem}",
        allowed="a word, a tab and its tag a line, an empty line between sentences",
        fix="correct it; a table of texts is to be called .csv",
    )


def columns(
    rows: Sequence[Mapping[str, Any]], text: str | None = None, label: str | None = None
) -> Columns:
    """Return which columns hold the words and their tags, or the text and its spans.

    Args:
        rows: At least one; the first one's columns count.
        text: ``text_column`` of the configuration.
        label: ``label_column``.

    Raises:
        DataError: FG-CLASS-002, a name that the rows do not have; FG-CLASS-003 and FG-CLASS-031,
            nothing to guess.
    """
    found = [str(column) for column in rows[0]]
    labels.require_column(text, "text_column", found)
    labels.require_column(label, "label_column", found)
    lower = {column.lower(): column for column in found}
    first = text or next((lower[name] for name in _WORDS if name in lower), None)
    if first is None:
        rest = [column for column in found if column not in (label, *_SPANS)]
        first = labels.text_columns(rest)[0] if rest else None
    if first is not None and label is None:
        kinds = (*_TAGS, *_SPANS) if first.lower() in _WORDS else (*_SPANS, *_TAGS)
        label = next((lower[n] for n in kinds if n in lower and lower[n] != first), None)
    if first is None or label is None:
        raise DataError(
            "FG-CLASS-031",
            f"no columns of the rows ({', '.join(found)}) are known to hold marked texts",
            allowed='{"tokens": [...], "tags": [...]}, or {"text": "...", "entities": [{"start": '
            '0, "end": 5, "label": "city"}]}',
            fix="--text-column <words or text> --label-column <tags or spans>",
        )
    return Columns(first, label, _one_tag_a_word(rows, first, label))


def _one_tag_a_word(rows: Sequence[Mapping[str, Any]], text: str, label: str) -> bool:
    """Words come as a list, or their tags do; a list of spans holds objects or lists."""
    if any(isinstance(row.get(text), list | tuple) for row in rows):
        return True
    marks = next((row[label] for row in rows if row.get(label)), None)
    return isinstance(marks, str) or (
        isinstance(marks, list | tuple) and isinstance(marks[0], str | int)
    )


def read(
    rows: Sequence[Mapping[str, Any]],
    which: Columns,
    source: str = "the rows",
    names: Sequence[str] | None = None,
) -> Examples:
    """Take texts and their spans out of rows.

    Args:
        names: Of the tags 0, 1, ..., for rows that say numbers.

    Returns:
        Examples whose labels are lists of ``Span`` in the order of the text.

    Raises:
        DataError: FG-CLASS-004 no text, FG-CLASS-032 words and tags that do not fit together,
            FG-CLASS-033 numbers without names, FG-CLASS-034 a wrong span, FG-CLASS-035 spans that
            overlap; all with the row.
    """
    if which.words:
        texts, spans = _from_words(rows, which, source, names)
    else:
        texts = labels.texts_of(rows, which.text, source)
        spans = [
            _from_marks(row.get(which.label), text, f"{source}, row {number}")
            for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1)
        ]
    return Examples(texts, None, spans, list(range(1, len(rows) + 1)), source)


def _bad_words(where: str, problem: str) -> DataError:
    return DataError(
        "FG-CLASS-032",
        f"{where}: {problem}",
        allowed='as many tags as words, such as {"tokens": ["to", "Rome"], "tags": ["O", '
        '"B-city"]}; with B- and I- in front of every tag but O, or of none',
        fix="correct this row",
    )


def _listed(value: Any, where: str, column: str) -> list[Any]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list | tuple):
        return list(value)
    raise _bad_words(where, f"the column '{column}' holds {value!r:.60}, not a list")


def _from_words(
    rows: Sequence[Mapping[str, Any]], which: Columns, source: str, names: Sequence[str] | None
) -> tuple[list[str], list[list[Span]]]:
    split = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        words = [str(word) for word in _listed(row.get(which.text), where, which.text)]
        tags = _listed(row.get(which.label), where, which.label)
        if len(words) != len(tags):
            raise _bad_words(where, f"{len(words)} words and {len(tags)} tags")
        if not any(word.strip() for word in words):
            raise _bad_words(where, "no words")
        split.append((where, words, [_tag(tag, names, where) for tag in tags]))
    prefixed = any(tag.startswith(("B-", "I-")) for _, _, tags in split for tag in tags)
    texts, spans = [], []
    for where, words, tags in split:
        odd = next((t for t in tags if t != OUTSIDE and not PREFIXED.fullmatch(t)), None)
        if prefixed and odd is not None:
            raise _bad_words(where, f"the tag '{odd}' has no B- or I- in front, and others have")
        text, places = join(words)
        found = chunks(tags if prefixed else [t if t == OUTSIDE else f"I-{t}" for t in tags])
        texts.append(text)
        spans.append([Span(places[a][0], places[b - 1][1], kind) for a, b, kind in found])
    return texts, spans


def _tag(tag: Any, names: Sequence[str] | None, where: str) -> str:
    """A tag's name, written out where it is a number.

    Raises:
        DataError: FG-CLASS-033.
    """
    if isinstance(tag, str) and not tag.isdecimal():
        return OUTSIDE if tag.strip() in ("", "o", OUTSIDE) else tag.strip()
    number = int(tag) if isinstance(tag, int | str) and not isinstance(tag, bool) else -1
    if names is None or not 0 <= number < len(names):
        raise DataError(
            "FG-CLASS-033",
            f"{where}: the tag {tag!r} has no name",
            allowed="names, or numbers from 0 to one less than the names in class_names",
            fix="--class-names O,B-city,I-city,... with a name for each number in order",
        )
    return names[number]


def join(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Put words together as a text, without spaces between Chinese and Japanese ones.

    Returns:
        The text, and the first and one past the last character of every word.
    """
    text, places = "", []
    for word in (word.strip() for word in words):
        close = text and word and NO_SPACES.match(text[-1]) and NO_SPACES.match(word[0])
        if text and word and not close:
            text += " "
        places.append((len(text), len(text) + len(word)))
        text += word
    return text, places


def _from_marks(marks: Any, text: str, where: str) -> list[Span]:
    if not isinstance(marks, list | tuple | None):
        raise _bad_span(where, f"{marks!r:.60} is not a list of spans")
    spans = sorted({_span(mark, text, where) for mark in marks or ()}, key=lambda s: s.start)
    for before, after in itertools.pairwise(spans):
        if after.start < before.end:
            raise DataError(
                "FG-CLASS-035",
                f"{where}: '{text[before.start : before.end]}' ({before.label}) and "
                f"'{text[after.start : after.end]}' ({after.label}) overlap",
                allowed="spans that lie behind one another",
                fix="keep one of the two",
            )
    return spans


def _bad_span(where: str, problem: str) -> DataError:
    return DataError(
        "FG-CLASS-034",
        f"{where}: {problem}",
        allowed='{"start": 3, "end": 8, "label": "city"} in characters counted from 0, end not '
        'included, or [3, 8, "city"]',
        fix="correct this row",
    )


def _span(mark: Any, text: str, where: str) -> Span:
    """One span without the spaces at its ends."""
    said = None
    if isinstance(mark, Mapping):
        kinds = ("label", "type", "tag", "entity_group", "entity")
        kind = next((mark[key] for key in kinds if mark.get(key) is not None), None)
        start, end, said = mark.get("start"), mark.get("end"), mark.get("text")
    elif isinstance(mark, list | tuple) and len(mark) == 3:
        start, end, kind = mark
    else:
        raise _bad_span(where, f"{mark!r:.60} is not a span")
    if not (type(start) is int and type(end) is int and 0 <= start < end <= len(text)):
        raise _bad_span(where, f"{mark!r:.80} in a text of {len(text)} characters")
    if kind is None or not str(kind).strip():
        raise _bad_span(where, f"{mark!r:.80} has no label")
    if isinstance(said, str) and said.strip() != text[start:end].strip():
        raise _bad_span(
            where, f"characters {start} to {end} are '{text[start:end]}', and not '{said}'"
        )
    inside = text[start:end]
    if not inside.strip():
        raise _bad_span(where, f"{mark!r:.80} holds nothing but spaces")
    start += len(inside) - len(inside.lstrip())
    return Span(start, start + len(inside.strip()), str(kind).strip())
