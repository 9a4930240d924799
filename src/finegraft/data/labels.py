"""Labelled texts: their columns, and the names of their labels.

What: from rows to texts with labels (``columns``, ``read``), from labels to ids (``make``,
``Labels``). How: columns are guessed by name; the kind of problem comes from the labels (lists:
several a row; fractions: values to predict; anything else: one class a row). Constraint: whatever
is wrong with a row is said with its number. Trade-off: lists of equal length that hold only 0 and 1
are taken as one switch for each label, never as ids.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finegraft.core.errors import DataError, did_you_mean, near

CLASSES = "single_label_classification"
SEVERAL = "multi_label_classification"
VALUES = "regression"
PROBLEMS = (CLASSES, SEVERAL, VALUES)

# Column names, most telling first.
_LABELS = (
    *("label", "labels", "sentiment", "category", "categories", "class", "target", "intent"),
    *("topic", "topics", "tag", "tags", "emotion", "rating", "stars", "score", "output", "y"),
)
_PAIRS = (
    *(("text", "text_pair"), ("text1", "text2"), ("text_a", "text_b")),
    *(("sentence1", "sentence2"), ("sentence_a", "sentence_b"), ("premise", "hypothesis")),
    *(("question1", "question2"), ("question", "sentence"), ("question", "passage")),
    *(("query", "passage"), ("query", "document"), ("title", "body")),
)
_TEXTS = (
    *("text", "sentence", "review", "content", "comment", "utterance", "message", "tweet", "post"),
    *("document", "body", "question", "query", "prompt", "input", "title", "description"),
)
_SHOWN = 8  # row numbers in one message
# More labels than this, and more than one for every three rows, are texts and not classes.
_MANY_LABELS, _ROWS_A_LABEL = 50, 3


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; ``pair`` is the second text of a sentence pair."""

    text: str
    label: str
    pair: str | None = None


@dataclass(frozen=True)
class Examples:
    """Texts with their labels as they stand in the file, and their row numbers, 1-based."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    numbers: list[int]
    source: str = "the rows"

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, places: Sequence[int]) -> Examples:
        """The examples at ``places``, in that order."""
        return Examples(
            [self.texts[i] for i in places],
            None if self.pairs is None else [self.pairs[i] for i in places],
            [self.labels[i] for i in places],
            [self.numbers[i] for i in places],
            self.source,
        )

    def keys(self) -> list[str]:
        """The text (and pair) of each example without case, spacing and Unicode variants."""
        pairs = self.pairs or [""] * len(self)
        return [f"{_plain(a)}\0{_plain(b)}" for a, b in zip(self.texts, pairs, strict=True)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_columns(
    found: Sequence[str], text: str | None = None, pair: str | None = None
) -> tuple[str, str | None]:
    """Return the columns of the text and of its pair, guessed where they are not given.

    Raises:
        DataError: FG-CLASS-002, a name that the rows do not have; FG-CLASS-003, no column of texts.
    """
    for name, key in ((text, "text_column"), (pair, "text_pair_column")):
        require_column(name, key, found)
    by_lower = {str(column).lower(): str(column) for column in found}
    if text is None and pair is None:
        for first, second in _PAIRS:
            if first in by_lower and second in by_lower:
                return by_lower[first], by_lower[second]
    if text is None:
        text = next((by_lower[n] for n in _TEXTS if n in by_lower and by_lower[n] != pair), None)
    rest = [column for column in found if column != pair]
    if text is None and len(rest) == 1:
        text = rest[0]
    if text is None:
        raise _no_column("text", found)
    return text, pair


def columns(
    rows: Sequence[Mapping[str, Any]],
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
) -> Columns:
    """Return which columns hold text and label; what is not given is guessed by name.

    Args:
        rows: At least one; the first one's columns count.
        text: ``text_column`` of the configuration.
        pair: ``text_pair_column``.
        label: ``label_column``.

    Raises:
        DataError: FG-CLASS-002, a name that the rows do not have; FG-CLASS-003, nothing to guess.
    """
    found = [str(column) for column in rows[0]]
    require_column(label, "label_column", found)
    if label is None:
        by_lower = {column.lower(): column for column in found if column not in (text, pair)}
        label = next((by_lower[name] for name in _LABELS if name in by_lower), None)
    if label is None:
        texts = text_columns(found, text, pair)
        rest = [column for column in found if column not in texts]
        if len(rest) != 1:
            raise _no_column("label", found)
        label = rest[0]
    first, second = text_columns([c for c in found if c != label], text, pair)
    return Columns(first, label, second)


def require_column(name: str | None, key: str, found: Sequence[str]) -> None:
    """Prove that the rows have the column ``name``, which the setting ``key`` asks for; or None.

    Raises:
        DataError: FG-CLASS-002.
    """
    if name is None or name in found:
        return
    flag = key.replace("_", "-")
    raise DataError(
        "FG-CLASS-002",
        f"{key} is '{name}', and the rows have no such column",
        allowed=", ".join(found),
        fix=f"--{flag} {near(name, found) or '<one of these columns>'}",
    )


def _no_column(kind: str, found: Sequence[str]) -> DataError:
    return DataError(
        "FG-CLASS-003",
        f"no column of the rows ({', '.join(found)}) is known to hold the {kind}",
        allowed=", ".join(_TEXTS[:6] if kind == "text" else _LABELS[:8]) + " are found by name",
        fix=f"--{kind}-column <one of these columns>",
    )


def read(rows: Sequence[Mapping[str, Any]], which: Columns, source: str = "the rows") -> Examples:
    """Take texts and labels out of rows.

    Raises:
        DataError: FG-CLASS-004, rows without text; FG-CLASS-005, rows without label.
    """
    texts = texts_of(rows, which.text, source)
    pairs = texts_of(rows, which.pair, source) if which.pair else None
    labels = [row.get(which.label) for row in rows]
    empty = [
        n for n, x in enumerate(labels, 1) if x is None or (isinstance(x, str) and not x.strip())
    ]
    if empty:
        raise DataError(
            "FG-CLASS-005",
            f"{source}: {_rows(empty)} no label in the column '{which.label}'",
            allowed="a name or number in every row; an empty list where a row has no label at all",
            fix="label these rows or remove them",
        )
    return Examples(texts, pairs, labels, list(range(1, len(rows) + 1)), source)


def texts_of(rows: Sequence[Mapping[str, Any]], column: str, source: str = "the rows") -> list[str]:
    """The column of texts, numbers written out.

    Raises:
        DataError: FG-CLASS-004, rows without text, with their numbers.
    """
    values = [row.get(column) for row in rows]
    texts = [str(v) if isinstance(v, str | int | float) else "" for v in values]
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if empty:
        raise DataError(
            "FG-CLASS-004",
            f"{source}: {_rows(empty)} no text in the column '{column}'",
            allowed="a text that is not empty in every row",
            fix="write the texts or remove these rows",
        )
    return texts


def _rows(numbers: Sequence[int]) -> str:
    """``row 3 has`` or ``rows 3, 5 and 12 more have``."""
    if len(numbers) == 1:
        return f"row {numbers[0]} has"
    more = f" and {len(numbers) - _SHOWN:,} more" if len(numbers) > _SHOWN else ""
    return f"rows {', '.join(map(str, numbers[:_SHOWN]))}{more} have"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _name(value: Any) -> str:
    """A label as a name: ``1.0`` and ``1`` are the same class, so are ``"1 "`` and 1."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def problem_of(labels: Sequence[Any]) -> str:
    """The kind of problem that the labels are of; see the module."""
    if any(isinstance(label, list | tuple | set) for label in labels):
        return SEVERAL
    numbers = [_number(label) for label in labels]
    if all(n is not None for n in numbers) and any(n != int(n) for n in numbers if n is not None):
        return VALUES
    return CLASSES


def _names_of_rows(examples: Examples, problem: str) -> list[tuple[str, ...]]:
    """Names of the labels of each row; several may be lists, text with | ; or , or 0/1 vectors."""
    if problem == CLASSES:
        return [(_name(label),) for label in examples.labels]
    lists = [
        [part for part in re.split(r"[|;,]", label) if part.strip()]
        if isinstance(label, str)
        else list(label)
        if isinstance(label, list | tuple | set)
        else [label]
        for label in examples.labels
    ]
    if _switches(examples.labels):
        return [tuple(str(i) for i, x in enumerate(row) if x) for row in lists]
    return [tuple(dict.fromkeys(map(_name, row))) for row in lists]


def _switches(labels: Sequence[Any]) -> int:
    """How many labels rows like ``[0, 1, 0]`` switch on and off; 0 for other rows."""
    if not all(isinstance(label, list | tuple) for label in labels):
        return 0
    widths = {len(label) for label in labels}
    width = widths.pop() if len(widths) == 1 else 0
    return width if width > 1 and all(x in (0, 1) for row in labels for x in row) else 0


@dataclass(frozen=True)
class Labels:
    """The kind of problem and the names of its labels, a label's id being its place.

    Attributes:
        names: Empty for values.
        by_number: The rows say ``0, 1, ...`` for these names.
    """

    problem_type: str
    names: tuple[str, ...]
    by_number: bool = False

    @property
    def count(self) -> int:
        """Outputs of the model's head."""
        return len(self.names) or 1

    def encode(self, examples: Examples) -> list[Any]:
        """Ids, vectors of 0.0 and 1.0, or values: what a trainer takes.

        Raises:
            DataError: FG-CLASS-007, a label that is not known, with its row; FG-CLASS-010, labels
                of another kind.
        """
        if self.problem_type == VALUES:
            return _values(examples)
        ids = {name: i for i, name in enumerate(self.names)}
        if self.by_number:
            ids = {str(i): i for i in range(len(self.names))} | ids
        _require_kind(examples, self.problem_type)
        rows = _names_of_rows(examples, self.problem_type)
        for number, names in zip(examples.numbers, rows, strict=True):
            unknown = next((name for name in names if name not in ids), None)
            if unknown is not None:
                raise DataError(
                    "FG-CLASS-007",
                    f"{examples.source}, row {number}: unknown label '{unknown}'",
                    allowed=", ".join(self.names[:40]),
                    fix=f"correct it ({did_you_mean(unknown, self.names)}), or train with rows "
                    "that carry it",
                )
        if self.problem_type == CLASSES:
            return [ids[names[0]] for names in rows]
        held = [{ids[name] for name in names} for names in rows]
        return [[float(i in row) for i in range(len(self.names))] for row in held]

    def counts(self, encoded: Sequence[Any]) -> dict[str, int]:
        """Rows of each label, by name."""
        if self.problem_type == VALUES:
            return {}
        if self.problem_type == CLASSES:
            found = Counter(encoded)
            return {name: found[i] for i, name in enumerate(self.names)}
        return {name: int(sum(row[i] for row in encoded)) for i, name in enumerate(self.names)}


def make(
    examples: Examples, problem_type: str | None = None, names: Sequence[str] | None = None
) -> Labels:
    """Find the labels of the rows.

    Args:
        problem_type: One of ``PROBLEMS``; None: by the labels.
        names: All names in the order of their ids; None: those found, numbers by value, others by
            name.

    Raises:
        DataError: FG-CLASS-006, names that do not fit the rows; FG-CLASS-008, a single label;
            FG-CLASS-009, as many labels as texts have; FG-CLASS-010, labels of another kind.
    """
    problem = problem_type or problem_of(examples.labels)
    if problem == VALUES:
        _values(examples)
        return Labels(VALUES, ())
    _require_kind(examples, problem)
    rows = _names_of_rows(examples, problem)
    found = Counter(name for row in rows for name in row)
    _require_classes(found, len(rows), problem, names)
    numeric = all(_number(name) is not None for name in found)
    order = sorted(found, key=(lambda n: (float(n), n)) if numeric else str)
    if problem == SEVERAL:  # a switch may be off in every row
        order = [str(i) for i in range(_switches(examples.labels))] or order
    if names is None:
        return Labels(problem, tuple(order))
    if set(found) <= set(names):
        return Labels(problem, tuple(names))
    if set(found) <= {str(i) for i in range(len(names))}:
        return Labels(problem, tuple(names), by_number=True)
    raise DataError(
        "FG-CLASS-006",
        f"class_names is {', '.join(names)}, and the rows have {', '.join(order[:20])}",
        allowed=f"every label of the rows, or a name for each of 0 to {len(found) - 1}",
        fix=f"--class-names {','.join(order[:20])}",
    )


def _require_classes(
    found: Counter[str], rows: int, problem: str, names: Sequence[str] | None
) -> None:
    if len(found) < 2 and not (names and len(names) > 1) and problem == CLASSES:
        raise DataError(
            "FG-CLASS-008",
            f"every row has the same label, '{next(iter(found))}'",
            allowed="rows of at least two classes",
            fix="add rows of another class, or name the right column: --label-column <column>",
        )
    if not found:
        raise DataError(
            "FG-CLASS-008",
            "no row has a label",
            allowed="a list with at least one label in some row",
            fix="label the rows, or name the right column: --label-column <column>",
        )
    if len(found) > _MANY_LABELS and len(found) * _ROWS_A_LABEL > rows:
        raise DataError(
            "FG-CLASS-009",
            f"{len(found):,} different labels in {rows:,} rows ('{next(iter(found))[:40]}', ...): "
            "this column holds texts or identifiers, not classes",
            allowed=f"at least {_ROWS_A_LABEL} rows a label",
            fix="name the right column: --label-column <column>; numbers to predict: "
            "--problem-type regression; texts to write: --task causal",
        )


def _require_kind(examples: Examples, problem: str) -> None:
    """Raises DataError FG-CLASS-010 for lists where one class a row is asked for."""
    if problem == SEVERAL:
        return
    for number, label in zip(examples.numbers, examples.labels, strict=True):
        if isinstance(label, list | tuple | set | dict):
            raise DataError(
                "FG-CLASS-010",
                f"{examples.source}, row {number}: {label!r} is not one label",
                allowed="a name or a number",
                fix=f"--problem-type {SEVERAL}",
            )


def _values(examples: Examples) -> list[float]:
    values = [_number(label) for label in examples.labels]
    for number, label, value in zip(examples.numbers, examples.labels, values, strict=True):
        if value is None:
            raise DataError(
                "FG-CLASS-010",
                f"{examples.source}, row {number}: {label!r} is not a number",
                allowed="a finite number in every row, as problem_type is regression",
                fix=f"correct it, or --problem-type {CLASSES}",
            )
    return [value for value in values if value is not None]
