"""Exact match: the share of answers equal to their reference, white space around them aside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finegraft.inference.evaluate._contract import Answered, Metric, mean, with_ones

if TYPE_CHECKING:
    import numpy as np


def _sums(rows: Answered) -> np.ndarray:
    pairs = zip(rows.answers, rows.references, strict=True)
    return with_ones([float(got.strip() == want.strip()) for got, want in pairs])


METRIC = Metric(
    about="share of answers equal to the reference, white space around them aside; 0 to 1",
    sums=_sums,
    total=mean,
    share=True,
)
