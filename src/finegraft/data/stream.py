"""Rows of a corpus that is larger than memory, in a shuffled order that can be gone on with.

What: ``lay_out`` cuts the files of a specification into blocks, ``pieces`` gives rows without end,
``Cursor`` is a place among them. How: a pass takes the blocks in an order drawn from the seed; some
blocks at a time make a window, whose rows are read whole and drawn into one order. Lines and
Parquet row groups can be read from anywhere; other files (csv, compressed, ...) are read from front
to back, eight at a time, a thousand rows a block. Constraint: a cursor and the same files give the
same rows, so nothing but the cursor has to be kept to go on: the window is read again. Trade-off:
this is a shuffle of blocks and of the rows within a window, no permutation of all rows: neighbours
in a file stay within one window, which holds blocks from everywhere. What a row's place in the file
is told by is its byte, because counting lines would mean reading what lies before.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import xxhash

from finegraft.core.errors import DataError
from finegraft.data import readers, sources
from finegraft.data.rows import renamed
from finegraft.data.stream_files import File, Group, Lines, blocks_of, read_group, read_lines

BLOCK_BYTES, MOST_BLOCKS = 256 << 10, 50_000  # of lines; in larger corpora the blocks are larger
PIECE_ROWS = 1000  # rendered, and packed, together
WINDOW_BLOCKS = 16
WINDOW_BYTES = 32 << 20
LANES = 8  # files read from front to back at a time
_PROBED_ROWS = 200
_EXPANSION = 4  # of compressed text and Parquet, to rows


class Row(NamedTuple):
    """One row, the part of the specification that it is of, and its name in messages.

    Attributes:
        row: None for what cannot be read, about which ``wrong`` says why.
    """

    row: dict[str, Any] | None
    part: int
    name: str
    wrong: str = ""


class Slot(NamedTuple):
    """What a window is made of: a block, or the next rows of a lane.

    Attributes:
        file: Number of the file; of the lane, where ``block`` is None.
        bytes: About as many.
        keep: The share of its rows that is taken, for weights that are no whole numbers.
    """

    file: int
    block: Lines | Group | None
    bytes: int
    keep: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The blocks of a specification.

    Attributes:
        parts: As ``sources.parts`` gives them, with a map each.
        files: All files, in order.
        slots: What one pass reads, in the order of the files.
        lanes: Of files that are read from front to back: their number and the share that is taken.
    """

    parts: tuple[sources.Part, ...]
    files: tuple[File, ...]
    slots: tuple[Slot, ...]
    lanes: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def bytes(self) -> int:
        """Of one pass: a part of weight 2 counts twice."""
        return sum(slot.bytes for slot in self.slots)


@dataclass(frozen=True)
class Cursor:
    """A place: a piece of the window that begins at a slot of a pass.

    Attributes:
        lanes: For each lane the number of its file and how many rows of it were read, at the
            beginning of the window.
    """

    epoch: int = 0
    slot: int = 0
    lanes: tuple[tuple[int, int], ...] = ()
    piece: int = 0

    def as_list(self) -> list[Any]:
        """For JSON."""
        return [self.epoch, self.slot, [list(lane) for lane in self.lanes], self.piece]

    @classmethod
    def of(cls, values: list[Any]) -> Cursor:
        """From what ``as_list`` gave."""
        epoch, slot, lanes, piece = values
        return cls(epoch, slot, tuple((int(a), int(b)) for a, b in lanes), piece)


def lay_out(spec: sources.Spec, mapping: Mapping[str, str] | None = None) -> Plan:
    """Cut what a specification names into blocks; file ends and footers are read, no rows but few.

    Args:
        spec: As in ``sources.parts``.
        mapping: Columns to rename in the parts that have no ``map`` of their own.

    Raises:
        ConfigError, DataError: as ``sources.files``; FG-DATA-004 a file type without a reader;
            FG-STREAM-004, a JSON document that is too large to be read as a whole.
    """
    parts = tuple(replace(part, map=part.map or mapping or {}) for part in sources.parts(spec))
    found = [(which, path) for which, part in enumerate(parts) for path in sources.streamed(part)]
    files = tuple(File.of(path, which) for which, path in found)
    block = max(BLOCK_BYTES, sum(file.bytes for file in files) // MOST_BLOCKS)
    slots: list[Slot] = []
    serial: list[tuple[int, float]] = []
    for number, file in enumerate(files):
        whole, rest = divmod(parts[file.part].weight, 1)
        keeps = [1.0] * int(whole) + ([rest] if rest else [])
        blocks = blocks_of(file, block, len(files))
        for keep in keeps:
            if blocks is None:
                serial.append((number, keep))
            else:
                slots += [Slot(number, one, one.bytes, keep) for one in blocks]
    lanes = tuple(tuple(serial[k::LANES]) for k in range(min(LANES, len(serial))))
    slots += _lane_slots(files, lanes)
    return Plan(parts, files, tuple(slots), lanes)


def _lane_slots(files: tuple[File, ...], lanes: Any) -> Iterator[Slot]:
    """As many slots as each lane is guessed to fill; what is left is read at a pass's end."""
    known: dict[tuple[str, str], int] = {}
    for number, lane in enumerate(lanes):
        for which, keep in lane:
            file = files[which]
            kind = readers.suffixes(file.path)
            if kind not in known:
                known[kind] = _row_bytes(file)
            size = known[kind] * PIECE_ROWS
            expanded = file.bytes * (_EXPANSION if kind[1] or kind[0] == ".parquet" else 1)
            for _ in range(max(1, math.ceil(expanded / size))):
                yield Slot(number, None, size, keep)


def _row_bytes(file: File) -> int:
    first = list(itertools.islice(readers.rows_of(file.path), _PROBED_ROWS))
    if not first:
        return 1 << 10
    return max(
        16,
        sum(len(json.dumps(row, default=str, ensure_ascii=False)) for row in first) // len(first),
    )


def pieces(
    plan: Plan,
    seed: int,
    start: Cursor | None = None,
    takes: Callable[[dict[str, Any]], bool] | None = None,
) -> Iterator[tuple[Cursor, list[Row]]]:
    """Rows in shuffled order, up to ``PIECE_ROWS`` at a time, pass after pass.

    Args:
        plan: From ``lay_out``.
        seed: Of every order.
        start: Where to go on; None: at the beginning.
        takes: Rows for which it is false are left out.

    Yields:
        Where each piece begins, and its rows, with what cannot be read among them. It ends only
        where a whole pass has none.
    """
    cursor = start or Cursor()
    while True:
        found = False
        for here, rows in _pass(plan, seed, cursor, takes):
            found = True
            yield here, rows
        if not found and not cursor.slot and not cursor.piece:
            return
        cursor = Cursor(cursor.epoch + 1)


def _pass(
    plan: Plan, seed: int, start: Cursor, takes: Callable[[dict[str, Any]], bool] | None
) -> Iterator[tuple[Cursor, list[Row]]]:
    """One pass, from ``start`` on."""
    order = list(range(len(plan.slots)))
    random.Random(f"order {seed} {start.epoch}").shuffle(order)
    lanes = _Lanes(plan, seed, start)
    at, skipped = start.slot, start.piece
    while at < len(order) or lanes.left():
        here = Cursor(start.epoch, at, lanes.places())
        rows: list[Row] = []
        if at < len(order):
            taken = _window([plan.slots[i] for i in order[at : at + WINDOW_BLOCKS]])
            for slot in taken:
                read = lanes.take(slot) if slot.block is None else _block_rows(plan, slot)
                rows += _taken(plan, seed, slot, read, takes)
            at += len(taken)
        else:  # the guess of ``_lane_slots`` was too low
            for lane in lanes.left():
                slot = Slot(lane, None, 0)
                rows += _taken(plan, seed, slot, lanes.take(slot), takes)
            at += 1
        random.Random(f"window {seed} {here.epoch} {here.slot}").shuffle(rows)
        count = math.ceil(len(rows) / PIECE_ROWS)
        for k in range(skipped, count):
            yield replace(here, piece=k), rows[k * PIECE_ROWS : (k + 1) * PIECE_ROWS]
        skipped = 0


def _window(slots: list[Slot]) -> list[Slot]:
    """As many of these as make a window: at least one."""
    total = 0
    for count, slot in enumerate(slots):
        total += slot.bytes
        if total > WINDOW_BYTES and count:
            return slots[:count]
    return slots


Found = Iterator[tuple[int, str, Any, float]]  # file, place, row or words about it, share taken


def _block_rows(plan: Plan, slot: Slot) -> Found:
    path, block = plan.files[slot.file].path, slot.block
    found: Iterator[tuple[str, dict[str, Any] | str]] = iter(())
    if isinstance(block, Lines):
        found = read_lines(path, block)
    elif isinstance(block, Group):
        found = read_group(path, block)
    for place, row in found:
        yield slot.file, place, row, slot.keep


def _taken(
    plan: Plan,
    seed: int,
    slot: Slot,
    read: Found,
    takes: Callable[[dict[str, Any]], bool] | None,
) -> Iterator[Row]:
    for file, place, row, keep in read:
        if keep < 1 and _share(f"{seed} {file} {place}") >= keep:
            continue
        part = plan.files[file].part
        name = f"{plan.files[file].path}, {place}"
        if isinstance(row, str):
            yield Row(None, part, name, row)
            continue
        mapping = plan.parts[part].map
        if mapping:
            try:
                row = next(renamed(iter([row]), mapping))
            except DataError as error:
                yield Row(None, part, name, error.found)
                continue
        if takes is None or takes(row):
            yield Row(row, part, name)


def _share(text: str) -> float:
    """A number from 0 to below 1 that looks drawn and is the same for the same text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64


def is_held_out(row: Mapping[str, Any], fraction: float) -> bool:
    """Whether a row is among the ``fraction`` that is held out: by its content, wherever it is."""
    return fraction > 0 and _share(json.dumps(row, sort_keys=True, default=str)) < fraction


class _Lanes:
    """Files that are read from front to back, several at a time.

    Args:
        plan: Whose lanes.
        seed: Of the order of the files of a lane.
        start: Where the pass goes on.
    """

    def __init__(self, plan: Plan, seed: int, start: Cursor):
        self.plan = plan
        self.entries: list[list[tuple[int, float]]] = []
        for number, lane in enumerate(plan.lanes):
            entries = list(lane)
            random.Random(f"lane {seed} {start.epoch} {number}").shuffle(entries)
            self.entries.append(entries)
        self.at = [list(place) for place in start.lanes] or [[0, 0] for _ in plan.lanes]
        self.open: list[Iterator[dict[str, Any]] | None] = [None] * len(plan.lanes)

    def places(self) -> tuple[tuple[int, int], ...]:
        """For each lane the number of its file and how many rows of it were read."""
        return tuple((entry, row) for entry, row in self.at)

    def left(self) -> list[int]:
        """Lanes that have not come to the end of their last file."""
        return [n for n, (entry, _) in enumerate(self.at) if entry < len(self.entries[n])]

    def take(self, slot: Slot) -> Found:
        """The next ``PIECE_ROWS`` rows of a lane, fewer at its end."""
        lane, left = slot.file, PIECE_ROWS
        while left and self.at[lane][0] < len(self.entries[lane]):
            entry, number = self.at[lane]
            file, keep = self.entries[lane][entry]
            rows = self.open[lane]
            if rows is None:
                read = readers.rows_of(self.plan.files[file].path)
                rows = self.open[lane] = itertools.islice(read, number, None)
            row = next(rows, None)
            if row is None:
                self.at[lane], self.open[lane] = [entry + 1, 0], None
                continue
            self.at[lane][1] += 1
            left -= 1
            yield file, f"row {number + 1}", row, keep


def first_row(plan: Plan, part: int) -> dict[str, Any]:
    """The first row of a part that can be read, its columns renamed.

    Raises:
        DataError: FG-DATA-002 there is none, FG-DATA-006 a column to rename is not there.
    """
    for file in plan.files:
        if file.part == part:
            for row in readers.rows_of(file.path):
                return next(renamed(iter([row]), plan.parts[part].map))
    raise DataError(
        "FG-DATA-002",
        f"{plan.parts[part].path} holds no rows",
        fix="write at least one row into it",
    )
