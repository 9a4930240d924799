"""The audit of a training set: what is wrong with which rows, before any weight is loaded.

What: ``audit`` reads rows once (twice where rows are nearly alike) and returns a ``Report`` with a
verdict and findings; ``CHECKS`` explains every code. How: ``scan`` looks at rows, ``judge``
compares them, ``tokens`` renders them where a tokenizer is given; ``fix`` writes what can be
mended. Constraint: memory grows by 190 bytes a row, not by the rows. Trade-off: a check that cannot
be nearly free of false alarms is left out, since an alarm that is ignored hides the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finegraft.data import sources
from finegraft.data.audit import judge, tokens
from finegraft.data.audit.checks import encoding
from finegraft.data.audit.families import CHECKS
from finegraft.data.audit.reading import Source, is_rows, layout_of
from finegraft.data.audit.report import Report
from finegraft.data.audit.scan import Progress, scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHECKS", "Report", "audit"]


def audit(
    source: Source,
    *,
    held_out: Source | None = None,
    mapping: Mapping[str, str] | None = None,
    task: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 1024,
    completion_only: bool | None = None,
    near: bool = True,
    processes: int = 1,
    token_rows: int = tokens.SAMPLE_ROWS,
    progress: Progress | None = None,
) -> Report:
    """Look at every row of a training set.

    Args:
        source: What ``sources.iter_rows`` reads, or a list of rows.
        held_out: The rows to evaluate with; looked at for leaks only.
        mapping: Columns to rename, wanted to found.
        task: ``causal`` or ``classification``; None: by the columns.
        columns: ``text``, ``pair`` and ``label`` of classification, where they are known.
        tokenizer: Counts tokens too, of at most ``token_rows`` rows; causal only.
        max_length: Longest row in training, in tokens.
        completion_only: As in training.
        near: Look for near duplicates, the slowest part.
        processes: 1 or 2; a list of rows is always read by one.
        token_rows: Above this many rows, every n-th is tokenised.
        progress: Called with the rows that are done, now and then.

    Raises:
        DataError: FG-DATA-002 no rows, FG-DATA-007 columns that fit no layout, and those of
            ``sources.iter_rows`` for files that cannot be opened.
    """
    named = "the rows" if is_rows(source) else sources.describe(source)
    if not is_rows(source):  # a second process finds no standard input and perhaps another folder
        source = sources.absolute(source)
    layout = layout_of(source, mapping, task, columns)
    here = judge.Where(source, layout, mapping)
    many = 1 if is_rows(source) else processes
    facts = scan(source, layout, mapping=mapping, near=near, processes=many, progress=progress)
    there = held = None
    if held_out:
        held_layout = layout_of(held_out, mapping, task, columns)
        there = judge.Where(held_out, held_layout, mapping)
        held = scan(held_out, held_layout, mapping=mapping, near=near)
    findings = judge.alone(facts, layout) + judge.compare(facts, held, here, there)
    measured = None
    if tokenizer is not None and layout.format is not None:
        measured = tokens.measure(
            here,
            facts.rows,
            tokenizer,
            max_length,
            completion_only=completion_only,
            limit=token_rows,
            skip=frozenset(facts.hits.get(encoding.SURROGATE, ())),
            progress=progress,
        )
        findings += measured.findings()
    return Report.of(named, layout.name, facts, findings, measured, near)
