"""BLEU: how many runs of up to four words answer and reference share, answers too short punished.

How: sacrebleu cuts words (its tokenizer 13a) and counts; the corpus score is that of the counts of
all rows added up. Trade-off: one row's BLEU is mostly 0, so rows are better compared by chrF.

Source: Papineni et al., "BLEU: a method for automatic evaluation of machine translation", 2002.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from finegraft.inference.evaluate._contract import Answered, Metric

if TYPE_CHECKING:
    import numpy as np


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


def _sums(rows: Answered) -> np.ndarray:
    import numpy as np

    counts = _bleu()._extract_corpus_statistics(rows.answers, [rows.references])
    return np.asarray(counts, dtype=np.float64)


def _total(row: np.ndarray) -> float:
    return float(_bleu()._compute_score_from_stats(row.astype(int).tolist()).score)


METRIC = Metric(
    about="BLEU of sacrebleu: shared runs of 1 to 4 words; 0 to 100",
    sums=_sums,
    total=_total,
    package="sacrebleu",
)
