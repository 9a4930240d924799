"""The audit of the rows inside a run, before weights load.

What: ``look`` runs ``data.audit`` on the configured files and gives lines for the terminal and a
record for data.json. How: the same code as ``finegraft data check``, without tokens, which
``prepare`` counts anyway. Constraint: training goes on whatever is found, except for rows that no
tokenizer can take. Trade-off: the files are read a second time, 1 s for 20,000 rows of 1,000
characters; near duplicates are left out above 100,000 rows, which the record says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finegraft.core.errors import DataError
from finegraft.core.schema import TrainConfig
from finegraft.data.audit import audit
from finegraft.data.audit.checks import duplicates
from finegraft.data.audit.checks.encoding import SURROGATE
from finegraft.data.sources import describe

NEAR_ROWS = 100_000
# copies, contradictions and leaks are found again, and said, where classification holds rows out
_TOLD = (duplicates.EXACT, duplicates.CONFLICT, duplicates.LEAK)
_MOST_LINES = 5
_MOST_ROW_NUMBERS = 100


@dataclass(frozen=True)
class Looked:
    """Lines to show, and what data.json keeps under ``audit``."""

    lines: list[str] = field(default_factory=list)
    record: dict[str, Any] | None = None


def look(
    config: TrainConfig,
    rows: int,
    *,
    task: str = "causal",
    columns: Mapping[str, str | None] | None = None,
    texts: Sequence[str] | None = None,
    sample: Sequence[Mapping[str, Any]] | None = None,
) -> Looked:
    """Audit the rows of a configuration, unless ``data_check`` is off.

    Args:
        rows: How many there are; decides whether near duplicates are looked for.
        task: As ``audit`` takes it.
        columns: Of classification.
        texts: One a row, of rows in a layout that ``audit`` does not read; looked at alone.
        sample: Rows to look at instead of those that the configuration names, columns renamed.

    Raises:
        DataError: FG-DATA-054, rows with half a character, at which every tokenizer stops.
    """
    if not config.data_check:
        return Looked()
    near = rows <= NEAR_ROWS
    given = [{"text": text} for text in texts] if texts is not None else sample
    report = audit(
        config.data if given is None else given,
        held_out=config.eval_data if given is None else None,
        mapping=config.map if given is None else None,
        task=task,
        columns=columns,
        near=near,
    )
    halves = next((f for f in report.findings if f.check.code == SURROGATE), None)
    if halves is not None:
        raise DataError(
            "FG-DATA-054",
            f"{describe(config.data)}: {halves.message}",
            allowed="whole characters, as UTF-8 has them",
            fix=f"finegraft data check {describe(config.data)} --fix cleaned.jsonl",
        )
    told = _TOLD if task == "classification" or texts is not None else ()
    report.findings = [f for f in report.findings if f.check.code not in told]
    lines = report.lines()
    more = len(lines) - _MOST_LINES
    if more > 0:
        lines = [*lines[:_MOST_LINES], f"{more} more findings: finegraft data check, or data.json"]
    if not near:
        lines.append(f"near duplicates were not looked for above {NEAR_ROWS:,} rows")
    return Looked(lines, report.record(_MOST_ROW_NUMBERS))
