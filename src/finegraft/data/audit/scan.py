"""One pass over the rows: what each of them has, and what is kept to compare them later.

What: ``scan`` reads a source once and returns ``Facts``: hits of the checks that need one row only,
and for each row two hashes, a length, a language and band keys. How: rows in chunks, whose texts
are joined into one block for ``gate``; with two processes each reads the whole source and works on
every second chunk, because parsing a row costs less than handing it over. Constraint: rows are
never kept; 1,000,000 of them take 60 MB here, 190 MB with band keys. Trade-off: a text that is only
wrong together with another row's text is not seen.
"""

from __future__ import annotations

import itertools
import multiprocessing
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from finegraft.data.audit import families
from finegraft.data.audit._contract import SHOWN_DETAILS, Scan
from finegraft.data.audit.checks import encoding, outliers, phrases
from finegraft.data.audit.gate import Gate
from finegraft.data.audit.minhash import BANDS, Sketches
from finegraft.data.audit.reading import Layout, excerpt, rows_of
from finegraft.data.audit.view import View, view_of

CHUNK_ROWS = 1000
_START_CHARS = 60
_LOWER = bytes(c + 32 if 65 <= c <= 90 else c for c in range(256))
_SHAPE = bytes(
    48 if 48 <= c <= 57 else 65 if 65 <= c <= 90 else 97 if 97 <= c <= 122 else c
    for c in range(256)
)
Progress = Callable[[int], None]


@dataclass
class Facts:
    """What one pass found.

    Attributes:
        rows: How many rows there are, bad lines among them.
        hits: Rows of each check's code, ascending.
        details: What stands there, for the first rows of each code.
        whole: Hash of each row without case and spacing; 0 where it has none.
        head: The same of everything before the last answer.
        chars: Length of the last answer, in characters.
        languages: As ``outliers.language``, negative where the prompt asks for one.
        keys: Band keys of the rows that ``sketched`` says; empty without near duplicates.
        labels: Rows of each label.
    """

    rows: int = 0
    hits: dict[str, list[int]] = field(default_factory=dict)
    details: dict[str, dict[int, str]] = field(default_factory=dict)
    whole: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    head: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    chars: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    languages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, BANDS), np.uint64))
    sketched: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    labels: dict[str, list[int]] = field(default_factory=dict)

    def hit(self, code: str, row: int, words: str) -> None:
        """Note that a check hit a row."""
        rows = self.hits.setdefault(code, [])
        if rows and rows[-1] == row:
            return
        rows.append(row)
        seen = self.details.setdefault(code, {})
        if len(seen) < SHOWN_DETAILS:
            seen[row] = words


def scan(
    source: Any,
    layout: Layout,
    *,
    mapping: Mapping[str, str] | None = None,
    near: bool = True,
    processes: int = 1,
    progress: Progress | None = None,
) -> Facts:
    """Read a source once.

    Args:
        source: As ``reading.rows_of`` takes it.
        layout: From ``reading.layout_of``.
        mapping: Columns to rename.
        near: Keep what finds near duplicates.
        processes: 1 or 2; 2 needs a source that can be read twice.
        progress: Called with the rows that are done, now and then.
    """
    if processes < 2:
        return _merged([_shard(source, layout, mapping, near, 0, 1, progress)])
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes - 1) as pool:
        others = [
            pool.apply_async(_shard, (source, layout, mapping, near, k, processes, None))
            for k in range(1, processes)
        ]
        own = _shard(source, layout, mapping, near, 0, processes, progress)
        return _merged([own, *(other.get() for other in others)])


def _shard(
    source: Any,
    layout: Layout,
    mapping: Mapping[str, str] | None,
    near: bool,
    which: int,
    of: int,
    progress: Progress | None,
) -> list[tuple[int, Facts]]:
    """Every ``of``-th chunk, with the number of rows before it."""
    scanner = _Scanner(layout, near)
    out = []
    for place, (first, rows) in enumerate(chunks(source, mapping)):
        if place % of == which:
            out.append((first, scanner.chunk(rows, first)))
            if progress is not None:
                progress(first + len(rows))
    return out


def chunks(source: Any, mapping: Mapping[str, str] | None) -> Iterator[tuple[int, list[Any]]]:
    """Yield chunks of rows, each with the number of rows before it."""
    rows, first = rows_of(source, mapping), 0
    while part := list(itertools.islice(rows, CHUNK_ROWS)):
        yield first, part
        first += len(part)


def _merged(shards: Sequence[list[tuple[int, Facts]]]) -> Facts:
    parts = [facts for _, facts in sorted(itertools.chain(*shards), key=lambda item: item[0])]
    out = Facts(rows=sum(part.rows for part in parts))
    for part in parts:
        for code, rows in part.hits.items():
            out.hits.setdefault(code, []).extend(rows)
            seen = out.details.setdefault(code, {})
            for row, words in itertools.islice(
                part.details[code].items(), SHOWN_DETAILS - len(seen)
            ):
                seen[row] = words
        for label, rows in part.labels.items():
            out.labels.setdefault(label, []).extend(rows)
    for name in ("whole", "head", "chars", "languages", "keys", "sketched"):
        if parts:
            setattr(out, name, np.concatenate([getattr(part, name) for part in parts]))
    return out


class _Scanner:
    """The work on chunks; gates are built once."""

    def __init__(self, layout: Layout, near: bool):
        self.layout = layout
        self.sketches = Sketches() if near else None
        scans = families.scans()
        self.gates = {
            where: Gate(
                (literal.encode(), scan)
                for scan in scans
                if scan.where == where
                for literal in scan.literals
            )
            for where in ("all", "answers", "starts")
        }
        self.shapes = Gate((shape.encode(), scan) for scan in scans for shape in scan.shapes)

    def chunk(self, rows: Sequence[Any], first: int) -> Facts:
        """Facts of one chunk; ``first`` rows stand before it."""
        views = [view_of(row, self.layout) for row in rows]
        facts = Facts(rows=len(rows))
        for number, view in enumerate(views, first + 1):
            for code, words in view.codes:
                facts.hit(code, number, words)
            if view.label is not None:
                facts.labels.setdefault(view.label, []).append(number)
        wholes = [f"{v.head}\n{v.tail}" if v.head else v.tail for v in views]
        self._texts(wholes, views, first, facts)
        self._compare(wholes, views, first, facts)
        for numbers in facts.hits.values():
            numbers.sort()
        return facts

    def _texts(self, wholes: list[str], views: list[View], first: int, facts: Facts) -> None:
        """Checks of single texts."""
        block, begins = _block(wholes)
        found = _rows(self.gates["all"].hits(block.translate(_LOWER)), begins)
        found |= _rows(self.shapes.hits(block.translate(_SHAPE)), begins)
        for scan, row in found:
            _confirm(scan, wholes[row], first + row + 1, facts)
        damaged = len(block.translate(None, encoding.CONTROL_BYTES)) != len(block)
        for row, text in enumerate(wholes):
            if damaged and (at := encoding.control(text)) is not None:
                facts.hit(encoding.CONTROL, first + row + 1, excerpt(repr(text[at : at + 40])))
            if not text.isascii() and encoding.suspect(text):
                for code, at in encoding.slower(text):
                    facts.hit(code, first + row + 1, excerpt(repr(text[max(at - 15, 0) : at + 45])))
        if any(len(text) >= 200 for text in wholes):
            self._runs(wholes, first, facts)
        answers = [view.answers for view in views]
        starts = [text[:_START_CHARS] for text in answers]
        for where, texts in (("answers", answers), ("starts", starts)):
            block, begins = _block(texts)
            for scan, row in _rows(self.gates[where].hits(block.translate(_LOWER)), begins):
                _confirm(scan, answers[row], first + row + 1, facts)
        for row, text in enumerate(answers):
            if phrases.loops(text):
                facts.hit(phrases.LOOP, first + row + 1, excerpt(text, len(text) - 60))

    @staticmethod
    def _runs(wholes: list[str], first: int, facts: Facts) -> None:
        """Long stretches without a space: every 100th character is looked at, then around it."""
        for row, text in enumerate(wholes):
            if len(text) < 200:
                continue
            if " " in text[:100] and all(
                " " in text[i : i + 100] or "\n" in text[i : i + 100]
                for i in range(100, len(text) - 99, 100)
            ):
                continue
            match = outliers.RUN_PATTERN.search(text)
            if match:
                facts.hit(outliers.RUN, first + row + 1, excerpt(text, match.start()))

    def _compare(self, wholes: list[str], views: list[View], first: int, facts: Facts) -> None:
        """What later tells rows apart."""
        sound = [bool(v.tail.strip() or v.calls) for v in views]
        facts.whole = np.zeros(len(views), np.uint64)
        facts.head = np.zeros(len(views), np.uint64)
        hashed = xxhash.xxh3_64_intdigest
        for i, view in enumerate(views):
            if sound[i]:
                head = _plain(view.head)
                if head:
                    facts.head[i] = hashed(head) or 1
                tail = _plain(view.tail + view.calls)
                facts.whole[i] = hashed(head + b"\0" + tail) or 1
        facts.chars = np.array([len(v.answers and v.tail) for v in views], np.int32)
        facts.languages = _languages(views)
        if self.sketches is None:
            facts.sketched = np.zeros(len(views), bool)
            facts.keys = np.zeros((0, BANDS), np.uint64)
            return
        keys, enough = self.sketches.bands(wholes)
        enough &= facts.whole != 0
        facts.sketched, facts.keys = enough, keys[enough]


def _block(texts: Sequence[str]) -> tuple[bytes, list[int]]:
    """All texts as bytes, one for each character, and where each begins."""
    begins = list(itertools.accumulate((len(text) + 1 for text in texts), initial=0))
    return "\n".join(texts).encode("latin-1", "replace"), begins


def _rows(hits: Iterator[tuple[int, Scan]], begins: list[int]) -> set[tuple[Scan, int]]:
    return {(scan, bisect_right(begins, at) - 1) for at, scan in hits}


def _confirm(scan: Scan, text: str, number: int, facts: Facts) -> None:
    match = scan.found(text)
    if match is None:
        return
    words = match[0]
    shown = f"{words[:4]}... ({len(words)} characters)" if scan.secret else None
    facts.hit(scan.code, number, shown or excerpt(text, match.start()))


def _plain(text: str) -> bytes:
    """A text without case and spaces; 1 us for 1,000 characters of ASCII, split and join take 5."""
    if text.isascii():
        return text.encode().translate(_LOWER, b" \t\n\r\x0b\x0c")
    return "".join(text.lower().split()).encode("utf-8", "surrogatepass")


def _languages(views: Sequence[View]) -> np.ndarray:
    found = np.array([outliers.language(v.tail if v.answers else v.head) for v in views], np.int8)
    usual = Counter(found[found > 0].tolist()).most_common(1)
    for row in np.flatnonzero((found > 0) & (found != (usual[0][0] if usual else 0))).tolist():
        if views[row].answers and outliers.asks_for_language(views[row].head):
            found[row] = -found[row]
    return found
