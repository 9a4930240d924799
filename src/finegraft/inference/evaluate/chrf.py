"""chrF: how many runs of up to six characters answer and reference share.

How: sacrebleu counts them; the corpus score is that of the counts of all rows added up. Good for
short answers and for languages with endings, where whole words seldom match.

Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from finegraft.inference.evaluate._contract import Answered, Metric

if TYPE_CHECKING:
    import numpy as np


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _sums(rows: Answered) -> np.ndarray:
    import numpy as np

    counts = _chrf()._extract_corpus_statistics(rows.answers, [rows.references])
    return np.asarray(counts, dtype=np.float64)


def _total(row: np.ndarray) -> float:
    return float(_chrf()._compute_score_from_stats(row.tolist()).score)


METRIC = Metric(
    about="chrF2 of sacrebleu: shared runs of 1 to 6 characters; 0 to 100",
    sums=_sums,
    total=_total,
    package="sacrebleu",
)
