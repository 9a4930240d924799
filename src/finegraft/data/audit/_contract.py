"""What a check is, and what it finds.

What: ``Check`` is a code with its explanation, ``Scan`` how a text check looks for it, ``Finding``
the rows that it hit. Constraint: a code never changes its meaning. Trade-off: the explanation lies
beside the code as data, so that the terminal, the report and ``finegraft explain`` say the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("error", "warning", "note")
SHOWN_ROWS = 8  # row numbers in one message
SHOWN_DETAILS = 5  # rows whose place is quoted


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with rows.

    Attributes:
        code: ``FG-CHECK-NNN``.
        title: What it is, in a few words.
        severity: ``error`` (do not train), ``warning`` (look at it) or ``note``.
        cause: Where it comes from and what it does to the model.
        cure: What to do.
        example: A row, or a part of one, that has it.
        fix: What ``--fix`` does: ``remove`` the row, ``change`` its texts, or nothing.
        mend: The change of one text.
    """

    code: str
    title: str
    severity: str
    cause: str
    cure: str
    example: str
    fix: str = ""
    mend: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES or self.fix not in ("", "remove", "change"):
            raise ValueError(f"{self.code}: severity {self.severity}, fix {self.fix}")


@dataclass(frozen=True)
class Scan:
    """How a check finds its texts: some literal is in the row, then the pattern decides.

    Attributes:
        code: Of the check.
        pattern: Searched in the text as it stands.
        literals: Lower-case ASCII; a text without any of them cannot match.
        shapes: The same, with ``0`` for every digit, ``A`` and ``a`` for letters.
        where: ``all`` texts of a row, or ``answers`` only.
        accept: Whether a match counts; gets the match and the whole text.
        secret: What matches is hidden in messages.
    """

    code: str
    pattern: re.Pattern[str]
    literals: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    where: str = "all"
    accept: Callable[[re.Match[str]], bool] | None = None
    secret: bool = False

    def found(self, text: str) -> re.Match[str] | None:
        """The first match that counts."""
        for match in self.pattern.finditer(text):
            if self.accept is None or self.accept(match):
                return match
        return None


@dataclass
class Finding:
    """Rows that a check hit.

    Attributes:
        check: Which one.
        rows: Numbers, 1-based, ascending; empty where it is about all rows together.
        note: What this finding says beyond its title.
        details: For the first rows, what stands there.
    """

    check: Check
    rows: list[int] = field(default_factory=list)
    note: str = ""
    details: dict[int, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """One sentence for people."""
        words = self.check.title
        if self.rows:
            words = f"{row_words(self.rows)}: {words}"
        return f"{words}; {self.note}" if self.note else words

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` and ``data.json`` have it."""
        return {
            "code": self.check.code,
            "severity": self.check.severity,
            "title": self.check.title,
            "message": self.message,
            "count": len(self.rows),
            "rows": self.rows,
            "details": {str(row): text for row, text in self.details.items()},
            "cure": self.check.cure,
            "fix": self.check.fix or None,
        }


def row_words(rows: list[int]) -> str:
    """``row 3`` or ``12 rows (3, 5, 9 and 9 more)``."""
    if len(rows) == 1:
        return f"row {rows[0]:,}"
    shown = ", ".join(f"{row:,}" for row in rows[:SHOWN_ROWS])
    more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
    return f"{len(rows):,} rows ({shown}{more})"
