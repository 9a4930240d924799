"""Rows of a corpus larger than memory as a trainer takes them.

What: ``Stream`` is an endless ``datasets.IterableDataset`` of rows with ids, labels and, packed,
``seq_lengths``. How: ``data.stream`` gives raw rows a piece at a time; a piece is rendered by
``data.prepare``, packed by ``data.pack``, and given out, while a thread makes the next one.
Constraint: where a piece begins is remembered, so that ``state`` of a number of rows and
``restore`` go on with the very row that follows; nothing else has to be kept. Trade-off: rows are
packed together within a piece of 1,000 only; a row that cannot be read or rendered is left out and
told, and training ends when they are more than one in a hundred.

Trainers go on with a stopped run by taking batches and throwing them away. What ``restore`` has
skipped is given to them as empty rows, which cost nothing to make.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
from datasets.iterable_dataset import ExamplesIterable

from finegraft.core.errors import DataError
from finegraft.data import stream
from finegraft.data.conversation import DatasetFormat
from finegraft.data.prepare import Counts, Prepared, prepare
from finegraft.data.rows import detect, tools_of
from finegraft.training.dataset import Rendering, columns

logger = logging.getLogger(__name__)

_MOST_WRONG, _FREE_WRONG = 0.01, 10  # share of the rows; as many are never too many
_SHOWN_WRONG = 5
_SKIPPED: dict[str, Any] = {"input_ids": [0], "labels": [-100]}
_NOTHING_LEFT = "FG-DATA-009"


@dataclass
class Totals:
    """What became of the rows so far. ``wrong`` could not be read or rendered."""

    read: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    wrong: int = 0

    def add(self, piece: Piece) -> None:
        """Count a piece that was given out."""
        self.read += piece.read
        self.wrong += len(piece.wrong)
        for name, value in asdict(piece.counts).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Piece:
    """Rendered rows.

    Attributes:
        cursor: Where they begin.
        rows: Ready for the collator.
        counts: Of the rows before they were packed.
        read: Rows that were read for it.
        wrong: Names of those that could not be used, and why.
    """

    cursor: stream.Cursor
    rows: list[dict[str, Any]]
    counts: Counts
    read: int
    wrong: list[str]


@dataclass
class Renderer:
    """Raw rows to pieces.

    Args:
        plan: Where rows come from.
        how: How they are rendered.
    """

    plan: stream.Plan
    how: Rendering
    formats: list[tuple[str, DatasetFormat]] = field(init=False)

    def __post_init__(self) -> None:
        parts = range(len(self.plan.parts))
        self.formats = [detect([stream.first_row(self.plan, part)]) for part in parts]

    def prepared(self, rows: list[stream.Row]) -> tuple[Prepared, list[str]]:
        """Rows rendered one by one, and what is wrong with the others."""
        wrong = [f"{row.name}: {row.wrong}" for row in rows if row.row is None]
        made: list[tuple[stream.Row, Any, Any]] = []
        for row in rows:
            if row.row is None:
                continue
            try:
                messages = self.formats[row.part][1].to_messages(row.row)
                tools = tools_of([row.row])
            except DataError as error:
                wrong.append(f"{row.name}: {error.found}")
                continue
            made.append((row, messages, tools[0] if tools else None))
        return self._rendered(made, wrong), wrong

    def _rendered(self, made: list[tuple[stream.Row, Any, Any]], wrong: list[str]) -> Prepared:
        """All together; where one of them cannot be rendered, halves, down to that one."""
        if not made:
            return Prepared([], [], Counts(0, 0, 0, 0, 0), [])
        try:
            return prepare(
                [messages for _, messages, _ in made],
                self.how.tokenizer,
                max_length=self.how.max_length,
                completion_only=self.how.completion_only,
                truncation=self.how.truncation,
                tools=[tools for *_, tools in made] if any(t for *_, t in made) else None,
                names=[row.name for row, *_ in made],
            )
        except DataError as error:
            if error.code == _NOTHING_LEFT:
                return Prepared([], [], Counts(0, 0, 0, 0, len(made)), [])
            if len(made) == 1:
                wrong.append(error.found)
                return Prepared([], [], Counts(0, 0, 0, 0, 0), [])
        half = len(made) // 2
        one, other = self._rendered(made[:half], wrong), self._rendered(made[half:], wrong)
        both = {k: v + getattr(other.counts, k) for k, v in asdict(one.counts).items()}
        ids, labels = one.input_ids + other.input_ids, one.labels + other.labels
        return Prepared(ids, labels, Counts(**both), [])

    def piece(self, cursor: stream.Cursor, rows: list[stream.Row]) -> Piece:
        """Rows as the trainer takes them."""
        prepared, wrong = self.prepared(rows)
        return self.of(cursor, prepared, len(rows), wrong)

    def of(self, cursor: stream.Cursor, prepared: Prepared, read: int, wrong: list[str]) -> Piece:
        """A piece of rows that are rendered already."""
        made = columns(prepared.input_ids, prepared.labels, self.how)
        rows = [dict(zip(made, v, strict=True)) for v in zip(*made.values(), strict=True)]
        return Piece(cursor, rows, prepared.counts, read, wrong)


class Stream(datasets.IterableDataset):
    """Endless rows; see the module.

    Args:
        renderer: Makes pieces.
        seed: Of the order.
        held_out: The share of the rows that is never given.
        first: The first piece, which the check of the rows has rendered already.
        tell: Called with what a person should know.
    """

    def __init__(
        self,
        renderer: Renderer,
        seed: int,
        held_out: float,
        first: Piece,
        tell: Callable[[str], None] = logger.warning,
    ):
        super().__init__(ExamplesIterable(lambda: iter(()), {}))
        self.renderer, self.seed, self.held_out = renderer, seed, held_out
        self.first, self.tell = first, tell
        self.totals = Totals()
        self._told_before: set[str] = set()
        self.restore(None)

    def longest(self, count: int) -> list[int]:
        """Lengths of the ``count`` longest rows of the first piece, in tokens."""
        if self.renderer.how.packing:
            return [self.renderer.how.max_length] * count
        return sorted(len(row["input_ids"]) for row in self.first.rows)[-count:]

    def summary(self) -> str:
        """What became of the rows that were read, the last ones of which may not be trained on."""
        of = self.totals
        return (
            f"of {of.read:,} rows that were read {of.truncated:,} were longer than "
            f"{self.renderer.how.max_length:,} tokens and cut, {of.dropped:,} had nothing to "
            f"learn, {of.wrong:,} could not be used"
        )

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on where ``state`` was; None: begin with the first row."""
        mark = {"given": 0, "cursor": self.first.cursor.as_list(), "totals": asdict(Totals())}
        self._start: dict[str, Any] = state or {"rows": 0, "mark": mark}
        self._marks: list[dict[str, Any]] = []

    def state(self, rows: int) -> dict[str, Any]:
        """What ``restore`` takes to go on after so many rows; JSON."""
        before = [mark for mark in self._marks if mark["given"] <= rows]
        del self._marks[: max(0, len(before) - 1)]  # in place: the iterator appends to this list
        return {"rows": rows, "mark": before[-1] if before else self._start["mark"]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = self._start
        for _ in range(start["rows"]):
            yield dict(_SKIPPED)
        marks = self._marks = []
        given = start["mark"]["given"]
        totals = self.totals = Totals(**start["mark"]["totals"])
        for piece in self._pieces(stream.Cursor.of(start["mark"]["cursor"])):
            marks.append(
                {"given": given, "cursor": piece.cursor.as_list(), "totals": asdict(totals)}
            )
            self._told(piece, totals)
            yield from piece.rows[max(0, start["rows"] - given) :]
            given += len(piece.rows)

    def _told(self, piece: Piece, totals: Totals) -> None:
        """Count a piece and tell what is wrong with it.

        Raises:
            DataError: FG-STREAM-005, too many rows cannot be used.
        """
        for place, words in enumerate(piece.wrong[: _SHOWN_WRONG + 1], totals.wrong):
            more = f"{totals.wrong + len(piece.wrong)} rows or more are left out"
            words = f"left out: {words}" if place < _SHOWN_WRONG else more
            if place <= _SHOWN_WRONG and words not in self._told_before:
                self._told_before.add(words)  # trainers begin with the first rows more than once
                self.tell(words)
        totals.add(piece)
        require_few(totals, piece.wrong)

    def _pieces(self, start: stream.Cursor) -> Iterator[Piece]:
        """Rendered pieces; the next one is made in a thread while one is given out."""
        takes = takes_for_training(self.held_out)
        raw = stream.pieces(self.renderer.plan, self.seed, start, takes)

        def make() -> Piece:
            return self.renderer.piece(*next(raw))

        if start == self.first.cursor:
            yield self.first
            next(raw)
        with ThreadPoolExecutor(1, "finegraft-rows") as pool:
            coming = pool.submit(make)
            while True:
                piece = coming.result()
                coming = pool.submit(make)
                yield piece


def takes_for_training(held_out: float) -> Callable[[dict[str, Any]], bool] | None:
    """Which rows are trained on; None: all."""
    if not held_out:
        return None
    return lambda row: not stream.is_held_out(row, held_out)


def require_few(totals: Totals, wrong: list[str]) -> None:
    """Prove that few rows cannot be used.

    Raises:
        DataError: FG-STREAM-005.
    """
    if totals.wrong > max(_FREE_WRONG, _MOST_WRONG * totals.read):
        raise DataError(
            "FG-STREAM-005",
            f"{totals.wrong:,} of the first {totals.read:,} rows cannot be used, the last of them "
            f"{(wrong or ['among those before'])[-1]}",
            allowed="one row in a hundred, which is left out",
            fix="finegraft data check names the rows of a file; --fix writes the good ones",
        )
