"""Labels of classification rows: spelt in two ways, rare, or lopsided."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from finegraft.data.audit._contract import Check

TYPO, SPELLING, RARE, LOPSIDED, SINGLE = (f"FG-CHECK-{n:03d}" for n in range(90, 95))

CHECKS = (
    Check(
        TYPO,
        "a label that looks like a misspelt one",
        "warning",
        "A label with very few rows differs by a letter or two from one with many. It becomes a "
        "class of its own.",
        "Correct the label.",
        "positve, 2 rows, beside positive, 980 rows",
    ),
    Check(
        SPELLING,
        "a label that differs from another in case or spaces only",
        "warning",
        "Positive and positive are two classes to a program.",
        "Write them alike; --fix writes the more frequent one.",
        "Positive and positive",
        "change",
    ),
    Check(
        RARE,
        "a label with fewer than 10 rows",
        "warning",
        "Too few to learn and, once some are held out, to measure.",
        "Collect more rows of it, or join it with another label.",
        "refund: 3 rows",
    ),
    Check(
        LOPSIDED,
        "one label has nearly all rows",
        "warning",
        "A model that always says it would be right that often, so accuracy says little.",
        "Look at f1 instead of accuracy, and train with class_weights: balanced.",
        "ok: 97% of the rows",
    ),
    Check(
        SINGLE,
        "every row has the same label",
        "error",
        "There is nothing to tell apart.",
        "Name the right column with --label-column, or add rows of another label.",
        "ok: all rows",
    ),
)
FEW_ROWS, MOST_SHARE = 10, 0.9
_TYPO_SHARE, _TYPO_ROWS, _CLOSE = 0.05, 5, 0.8


def spelt_alike(counts: Mapping[str, int]) -> dict[str, str]:
    """Labels that differ from a more frequent one in case and spaces only, and that one."""
    best: dict[str, str] = {}
    for label in sorted(counts, key=lambda name: (-counts[name], name)):
        best.setdefault(_folded(label), label)
    return {label: best[_folded(label)] for label in counts if best[_folded(label)] != label}


def misspelt(counts: Mapping[str, int]) -> dict[str, str]:
    """Rare labels that are close to a frequent one, and that one."""
    alike = spelt_alike(counts)
    names = [name for name in counts if name not in alike]
    out = {}
    for rare in names:
        often = [n for n in names if n != rare and counts[rare] <= max(1, _TYPO_SHARE * counts[n])]
        if counts[rare] > _TYPO_ROWS or len(rare) < 4 or any(map(str.isdigit, rare)):
            continue
        close = difflib.get_close_matches(rare.lower(), [n.lower() for n in often], 1, _CLOSE)
        if close:
            out[rare] = next(n for n in often if n.lower() == close[0])
    return out


def _folded(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())
