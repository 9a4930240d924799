"""Measures of answers, one file each, and what runs them over rows.

What: ``METRICS`` finds a measure by its file name, or a third party's by the entry-point group
``finegraft.metric``; ``examine`` lets a model answer rows and scores the right answers; ``compare``
makes values, intervals and differences of it; ``from_file`` makes a measure of somebody's own
function. How: see ``_contract``.
"""

from __future__ import annotations

from finegraft.core.registry import Registry
from finegraft.inference.evaluate._compare import changed, compare, each_row, pairwise, same_tokens
from finegraft.inference.evaluate._contract import Answered, Metric, require_package
from finegraft.inference.evaluate._examine import Rows, examine, longest_answer, questions
from finegraft.inference.evaluate._labels import judge_labels, judge_spans
from finegraft.inference.evaluate._scorer import from_file

METRICS: Registry[Metric] = Registry("finegraft.inference.evaluate", "METRIC", "metric")

__all__ = [
    "METRICS",
    "Answered",
    "Metric",
    "Rows",
    "changed",
    "compare",
    "each_row",
    "examine",
    "from_file",
    "judge_labels",
    "judge_spans",
    "longest_answer",
    "pairwise",
    "questions",
    "require_package",
    "same_tokens",
]
