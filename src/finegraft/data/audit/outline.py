"""Numbers about all rows that charts show: lengths, languages, labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from finegraft.data.audit.checks.outliers import LANGUAGES
from finegraft.data.audit.scan import Facts

_MOST_VALUES = 20_000  # of a histogram
_MOST_LABELS = 30


@dataclass
class Outline:
    """Lengths of answers in characters (a sample above 20,000), rows by language and by label."""

    answer_chars: list[int] = field(default_factory=list)
    languages: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Facts) -> Outline:
        """Sum the facts up."""
        known = facts.chars[facts.chars > 0]
        step = max(1, len(known) // _MOST_VALUES)
        told = np.bincount(np.abs(facts.languages.astype(np.int64)), minlength=len(LANGUAGES))
        order = np.argsort(-told[1:], kind="stable") + 1
        languages = {LANGUAGES[i]: int(told[i]) for i in order if told[i]}
        if languages and told[0]:
            languages["unclear"] = int(told[0])
        often = sorted(facts.labels.items(), key=lambda item: -len(item[1]))[:_MOST_LABELS]
        return cls(known[::step].tolist(), languages, {name: len(rows) for name, rows in often})
