"""The three ROUGE measures, by Google's rouge-score.

How: words are lower-cased runs of letters and digits, without stemming; the score is the mean of
the rows' F1, as in the literature. Trade-off: rouge-score keeps only a to z and digits of a text,
so a script without them always scores 0; such rows are better measured by chrF.

Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from finegraft.inference.evaluate._contract import Answered, Metric, mean, with_ones

if TYPE_CHECKING:
    import numpy as np


@cache
def _scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=False)


def make(kind: str, words: str) -> Metric:
    """The measure called ``kind`` in rouge-score."""

    def sums(rows: Answered) -> np.ndarray:
        pairs = zip(rows.references, rows.answers, strict=True)
        return with_ones([_scorer(kind).score(want, got)[kind].fmeasure for want, got in pairs])

    return Metric(
        about=f"{words}, mean over rows; 0 to 1", sums=sums, total=mean, package="rouge-score"
    )
