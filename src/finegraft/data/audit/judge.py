"""From facts about single rows to findings about the whole.

What: duplicates, contradictions, leaks, outliers and labels are found by comparing hashes; then
every hit becomes a ``Finding``. How: numpy sorts; near duplicates are candidates of ``minhash``
whose texts are read a second time and compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from finegraft.data.audit import minhash
from finegraft.data.audit._contract import SHOWN_DETAILS, Finding
from finegraft.data.audit.checks import duplicates, labels, markup, outliers, structure
from finegraft.data.audit.families import CHECKS
from finegraft.data.audit.reading import Layout, Source
from finegraft.data.audit.scan import Facts, chunks
from finegraft.data.audit.view import view_of

_MANY_PAIRS, _LEAST_SHARED = 200_000, 2
_RENDERED_SHARE = 0.5
_SAID_LABELS = 8
_MOST_LABELS = 200  # more are texts and not labels


class Where:
    """A source that can be read again."""

    def __init__(self, source: Source, layout: Layout, mapping: Mapping[str, str] | None):
        self.source, self.layout, self.mapping = source, layout, mapping

    def texts(self, wanted: np.ndarray) -> Iterator[tuple[list[int], list[str]]]:
        """Yield places (0-based) and texts of some rows, chunk by chunk; ``wanted`` ascends."""
        for first, rows in chunks(self.source, self.mapping):
            begin, end = np.searchsorted(wanted, (first, first + len(rows)))
            places = wanted[begin:end].tolist()
            views = [view_of(rows[place - first], self.layout) for place in places]
            yield places, [f"{v.head}\n{v.tail}" if v.head else v.tail for v in views]
            if end == len(wanted):
                break


def compare(facts: Facts, held: Facts | None, here: Where, there: Where | None) -> list[Finding]:
    """Duplicates, contradictions and leaks."""
    copies, first_of = _copies(facts.whole)
    findings = [
        Finding(
            CHECKS[duplicates.EXACT],
            (copies + 1).tolist(),
            details={int(c) + 1: f"row {first_of[int(c)] + 1:,}" for c in copies[:SHOWN_DETAILS]},
        ),
        _conflicts(facts),
    ]
    leaked: np.ndarray = np.zeros(0, np.int64)
    if held is not None:
        leaked, finding = _leaks(facts, held)
        findings.append(finding)
    if facts.sketched.any():
        skipped = np.union1d(copies, leaked)
        findings += _near(facts, held, here, there, skipped)
    return findings


def _copies(hashes: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Places of rows whose hash stands before them, and where it stands first."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = np.append(False, (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    copies = order[same]
    return np.sort(copies), dict(zip(copies.tolist(), order[first[same]].tolist(), strict=True))


def _conflicts(facts: Facts) -> Finding:
    """Rows whose head is another row's and whose answer is not."""
    order = np.lexsort((facts.whole, facts.head))
    head, whole = facts.head[order], facts.whole[order]
    new_head = np.append(True, head[1:] != head[:-1])
    group = np.cumsum(new_head) - 1
    new_pair = new_head | np.append(True, whole[1:] != whole[:-1])
    answers = np.bincount(group, new_pair)
    hit = (answers[group] > 1) & (head != 0)
    rows = np.sort(order[hit]) + 1
    partner: dict[int, list[int]] = {}
    for g in np.unique(group[hit])[:SHOWN_DETAILS]:
        members = sorted((order[group == g] + 1).tolist())
        partner |= {row: [m for m in members if m != row][:3] for row in members}
    details = {
        row: "as row " + ", ".join(f"{m:,}" for m in partner[row])
        for row in rows.tolist()[:SHOWN_DETAILS]
        if row in partner
    }
    prompts = len(np.unique(group[hit]))
    note = f"{prompts:,} prompt{'s' * (prompts != 1)}"
    return Finding(CHECKS[duplicates.CONFLICT], rows.tolist(), note, details)


def _leaks(facts: Facts, held: Facts) -> tuple[np.ndarray, Finding]:
    """Rows whose prompt (or, without one, whose text) is in the held-out file."""
    own = np.where(facts.head != 0, facts.head, facts.whole)
    other = np.where(held.head != 0, held.head, held.whole)
    order = np.argsort(other, kind="stable")
    at = np.searchsorted(other[order], own)
    at[at == len(other)] = 0
    hit = np.flatnonzero((own != 0) & (other[order][at] == own)) if len(other) else np.zeros(0, int)
    details = {
        int(row) + 1: f"held-out row {int(order[at[row]]) + 1:,}" for row in hit[:SHOWN_DETAILS]
    }
    note = f"{len(np.unique(own[hit])):,} of {held.rows:,} held-out rows"
    return hit, Finding(CHECKS[duplicates.LEAK], (hit + 1).tolist(), note, details)


def _near(
    facts: Facts, held: Facts | None, here: Where, there: Where | None, skipped: np.ndarray
) -> list[Finding]:
    """Rows that are nearly an earlier row, or nearly a held-out one."""
    size = facts.rows
    places = np.flatnonzero(facts.sketched)
    keys, heads, wholes = facts.keys, facts.head, facts.whole
    if held is not None:
        places = np.concatenate([places, size + np.flatnonzero(held.sketched)])
        keys = np.concatenate([keys, held.keys])
        heads, wholes = (
            np.concatenate([a, b]) for a, b in ((heads, held.head), (wholes, held.whole))
        )
    pairs = minhash.candidates(keys)
    if len(pairs) > _MANY_PAIRS:
        shared = np.zeros(len(pairs), np.int8)
        for band in range(keys.shape[1]):
            shared += keys[pairs[:, 0], band] == keys[pairs[:, 1], band]
        pairs = pairs[shared >= _LEAST_SHARED]
    pairs = places[pairs]
    a, b = pairs[:, 0], pairs[:, 1]
    later = np.where(b < size, b, a)  # the row of ours that would go
    told = np.isin(later, skipped) | (wholes[a] == wholes[b]) | (a >= size)
    told |= (heads[a] == heads[b]) & (heads[a] != 0)
    pairs = pairs[~told]
    close = _exactly(pairs, size, here, there)
    within = {int(b): int(a) for a, b in close if b < size}
    across = {int(a): int(b) - size for a, b in close if b >= size}
    return [
        _pairs(duplicates.NEAR, within, "row"),
        _pairs(duplicates.NEAR_LEAK, across, "held-out row"),
    ]


def _pairs(code: str, found: dict[int, int], word: str) -> Finding:
    rows = sorted(found)
    details = {row + 1: f"{word} {found[row] + 1:,}" for row in rows[:SHOWN_DETAILS]}
    return Finding(CHECKS[code], [row + 1 for row in rows], details=details)


def _exactly(
    pairs: np.ndarray, size: int, here: Where, there: Where | None
) -> list[tuple[int, int]]:
    """The pairs whose groups of words are shared to 80% and whose numbers are the same."""
    if not len(pairs):
        return []
    places = np.unique(pairs)
    sides = [(here, places[places < size], 0)]
    if there is not None:
        sides.append((there, places[places >= size] - size, size))
    sketches, groups, numbers = minhash.Sketches(), {}, {}
    for where, wanted, offset in sides:
        for part, texts in where.texts(wanted):
            if not part:
                continue
            hashes, owner, counted = sketches.shingles(texts)
            cuts = np.searchsorted(owner, np.arange(len(part) + 1))
            for i, place in enumerate(part):
                groups[place + offset] = np.unique(hashes[cuts[i] : cuts[i + 1]])
                numbers[place + offset] = counted[i]
    return [
        (a, b)
        for a, b in pairs.tolist()
        if numbers[a] == numbers[b] and minhash.jaccard(groups[a], groups[b]) >= minhash.THRESHOLD
    ]


def alone(facts: Facts, layout: Layout) -> list[Finding]:
    """Hits of single rows, outliers, labels and the number of rows."""
    hits = dict(facts.hits)
    rendered = len(hits.get(markup.TEMPLATE, ())) > _RENDERED_SHARE * facts.rows
    if layout.name == "text" and rendered:  # rendered by their owner, which is one way to do it
        hits.pop(markup.TEMPLATE)
    findings = [
        Finding(CHECKS[code], rows, details=facts.details[code]) for code, rows in hits.items()
    ]
    if layout.name != "classification":
        findings += _unusual(facts)
    findings += _labels(facts)
    if facts.rows < structure.USEFUL_ROWS:
        check = CHECKS[structure.FEW]
        if facts.rows < structure.LEAST_ROWS:
            check = replace(check, severity="error")
        said = f"there {'is' if facts.rows == 1 else 'are'} {facts.rows}"
        findings.append(Finding(check, note=f"{said}; 10 at least, 50 are a start"))
    return findings


def _unusual(facts: Facts) -> list[Finding]:
    long, short = outliers.lengths(facts.chars)
    others = outliers.foreign(facts.languages)

    def made(code: str, hit: np.ndarray, words: Callable[[int], str]) -> Finding:
        places = np.flatnonzero(hit)
        details = {int(p) + 1: words(int(p)) for p in places[:SHOWN_DETAILS]}
        return Finding(CHECKS[code], (places + 1).tolist(), details=details)

    chars, tongue = facts.chars, facts.languages
    return [
        made(outliers.LANGUAGE, others, lambda p: outliers.LANGUAGES[abs(int(tongue[p]))]),
        made(outliers.LONG, long, lambda p: f"{chars[p]:,} characters"),
        made(outliers.SHORT, short, lambda p: f"{chars[p]:,} characters"),
    ]


def _labels(facts: Facts) -> list[Finding]:
    """Balance and spelling; values and lists of labels are left alone."""
    counts = {label: len(rows) for label, rows in facts.labels.items()}
    if not counts or len(counts) > _MOST_LABELS or any(label[:1] in "[{" for label in counts):
        return []
    if any("." in label and label.replace(".", "").lstrip("-").isdigit() for label in counts):
        return []
    out = []
    for code, found in (
        (labels.TYPO, labels.misspelt(counts)),
        (labels.SPELLING, labels.spelt_alike(counts)),
    ):
        rows = sorted(row for label in found for row in facts.labels[label])
        named = [f"{a!r} beside {b!r}" for a, b in list(found.items())[:_SAID_LABELS]]
        out.append(Finding(CHECKS[code], rows, ", ".join(named)))
    wrong = {*labels.misspelt(counts), *labels.spelt_alike(counts)}
    kept = {label: n for label, n in counts.items() if label not in wrong}
    few = [label for label, n in kept.items() if n < labels.FEW_ROWS]
    if len(kept) == 1:
        out.append(Finding(CHECKS[labels.SINGLE], note=repr(next(iter(kept)))))
    elif few and sum(counts.values()) >= structure.USEFUL_ROWS:
        said = ", ".join(f"{label!r} {kept[label]}" for label in few[:_SAID_LABELS])
        rows = sorted(row for label in few for row in facts.labels[label])
        out.append(Finding(CHECKS[labels.RARE], rows, said))
    most = max(kept, key=lambda label: kept[label])
    share = kept[most] / sum(kept.values())
    if len(kept) > 1 and share > labels.MOST_SHARE:
        out.append(Finding(CHECKS[labels.LOPSIDED], note=f"{most!r}: {share:.0%} of the rows"))
    return out
