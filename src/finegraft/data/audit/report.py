"""The outcome of an audit, for programs, terminals and the page.

Constraint: keys of ``as_dict`` are documented in docs/data-check.md and keep their meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finegraft.data.audit._contract import SEVERITIES, Finding
from finegraft.data.audit.checks import structure
from finegraft.data.audit.outline import Outline
from finegraft.data.audit.scan import Facts
from finegraft.data.audit.tokens import Tokens

GOOD, LOOK, STOP = "good", "look at these", "do not train"


@dataclass
class Report:
    """What an audit found.

    Attributes:
        source: In words.
        layout: Name of the format, or ``classification``.
        rows: Of the training set, unreadable lines among them.
        findings: The gravest first.
        tokens: None without a tokenizer.
        outline: Numbers for charts.
        near: Near duplicates were looked for.
    """

    source: str
    layout: str
    rows: int
    findings: list[Finding] = field(default_factory=list)
    tokens: Tokens | None = None
    outline: Outline = field(default_factory=Outline)
    near: bool = True

    @classmethod
    def of(
        cls,
        source: str,
        layout: str,
        facts: Facts,
        findings: Sequence[Finding],
        measured: Tokens | None,
        near: bool,
    ) -> Report:
        """Sort findings and leave out those that hit nothing."""
        about_all = {structure.FEW}
        kept = [
            f
            for f in findings
            if f.rows
            or f.check.code in about_all
            or ((f.note and not f.rows) and f.check.code.startswith("FG-CHECK-09"))
        ]
        kept.sort(key=lambda f: (SEVERITIES.index(f.check.severity), f.check.code))
        return cls(source, layout, facts.rows, kept, measured, Outline.of(facts), near)

    @property
    def verdict(self) -> str:
        """``good``, ``look at these`` or ``do not train``."""
        found = {finding.check.severity for finding in self.findings}
        return STOP if "error" in found else LOOK if "warning" in found else GOOD

    @property
    def trained_tokens(self) -> int | None:
        """Tokens that carry a label, within ``max_length``; of a sample, an estimate."""
        return None if self.tokens is None else self.tokens.total(self.tokens.trained)

    @property
    def clean_rows(self) -> int:
        """Rows that no error or warning names."""
        hit = {r for f in self.findings if f.check.severity != "note" for r in f.rows}
        return self.rows - len(hit)

    def counts(self) -> dict[str, int]:
        """Findings by severity."""
        found = Counter(finding.check.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def lines(self) -> list[str]:
        """Errors and warnings as sentences, each with its code."""
        return [
            f"{f.message} ({f.check.code})" for f in self.findings if f.check.severity != "note"
        ]

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        out: dict[str, Any] = {
            "verdict": self.verdict,
            "source": self.source,
            "layout": self.layout,
            "rows": self.rows,
            "clean_rows": self.clean_rows,
            "near_duplicates": self.near,
            "trained_tokens": self.trained_tokens,
            "tokens": self._tokens(),
            "findings": [finding.as_dict() for finding in self.findings],
            "languages": self.outline.languages,
            "labels": self.outline.labels,
        }
        return out

    def record(self, most_rows: int = 100) -> dict[str, Any]:
        """As a run's ``data.json`` keeps it: at most ``most_rows`` row numbers a finding."""
        out = self.as_dict()
        for finding in out["findings"]:
            finding["rows"] = finding["rows"][:most_rows]
        return out

    def _tokens(self) -> dict[str, Any] | None:
        counted = self.tokens
        if counted is None or not counted.lengths:
            return None
        lengths, trained = np.array(counted.lengths), np.array(counted.trained)
        return {
            "measured_rows": counted.measured,
            "sampled": counted.sampled,
            "total": counted.total(counted.lengths),
            "trained": counted.total(counted.trained),
            "max_length": counted.max_length,
            "longest": int(lengths.max()),
            "median": int(np.median(lengths)),
            "needed_max_length": counted.needed or None,
            "trained_per_row": {
                "least": int(trained.min()),
                "median": int(np.median(trained)),
                "most": int(trained.max()),
            },
        }
