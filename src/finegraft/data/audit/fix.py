"""A cleaned copy of the rows, and a record of everything that was left out or changed.

What: ``write`` reads the rows once more and writes two files of JSON lines. How: each finding's
check says whether its rows go or which change of their texts mends them; changes are applied to
every text of the row. Constraint: the source is never touched and no file is overwritten.
Trade-off: the record holds the rows as they were, secrets too, so that everything can be undone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.errors import DataError
from finegraft.core.paths import storage_error
from finegraft.data.audit._contract import Check
from finegraft.data.audit.checks import labels, structure
from finegraft.data.audit.reading import Bad, Source, rows_of
from finegraft.data.audit.report import Report

_MAX_NESTED = 40


@dataclass(frozen=True)
class Written:
    """What became of the rows, and where."""

    path: Path
    record: Path
    kept: int
    changed: int
    removed: int


def targets(path: str | Path) -> tuple[Path, Path]:
    """The two files, which must not be there yet.

    Raises:
        DataError: FG-DATA-050 not a .jsonl file, FG-DATA-051 one of them is there.
    """
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise DataError(
            "FG-DATA-050",
            f"--fix {path} is not the name of a .jsonl file",
            allowed="cleaned rows are written as JSON lines, whatever was read",
            fix=f"--fix {path.with_suffix('.jsonl')}",
        )
    record = path.with_name(f"{path.stem}.changes.jsonl")
    for each in (path, record):
        if each.exists():
            raise DataError(
                "FG-DATA-051",
                f"{each} is there already",
                allowed="a name that is free; nothing is overwritten",
                fix=f"--fix {_free(path)}, or remove the file",
            )
    return path, record


def _free(path: Path) -> Path:
    numbers = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(2, 10_000))
    return next(p for p in numbers if not p.exists())


def write(
    report: Report, source: Source, path: str | Path, mapping: Mapping[str, str] | None = None
) -> Written:
    """Write the cleaned rows and the record.

    Args:
        report: Of exactly this source.
        source: As it was audited.
        path: Of the cleaned rows; the record goes beside it, ``<name>.changes.jsonl``.
        mapping: Columns to rename, as in the audit; the cleaned rows have the new names.

    Raises:
        DataError: FG-DATA-050 and FG-DATA-051.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    path, record = targets(path)
    plan = _plan(report)
    counted = {"kept": 0, "changed": 0, "removed": 0}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as out, open(record, "x", encoding="utf-8") as told:
            for number, row in enumerate(rows_of(source, mapping), 1):
                checks = plan.get(number, ())
                after = _mended(row, checks, report)
                if after is not None:
                    out.write(_line(after))
                    counted["kept"] += 1
                if after is None or after != row:
                    counted["removed" if after is None else "changed"] += 1
                    told.write(_line(_entry(number, row, after, checks)))
    except OSError as error:
        raise storage_error(error, path) from error
    return Written(path, record, **counted)


def _plan(report: Report) -> dict[int, list[Check]]:
    """Checks with a remedy, by row."""
    plan: dict[int, list[Check]] = {}
    for finding in report.findings:
        if finding.check.fix:
            for row in finding.rows:
                plan.setdefault(row, []).append(finding.check)
    return plan


def _entry(number: int, row: Any, after: Any, checks: Sequence[Check]) -> dict[str, Any]:
    removing = [check for check in checks if check.fix == "remove"]
    used = removing if after is None else checks
    entry: dict[str, Any] = {
        "row": number,
        "action": "removed" if after is None else "changed",
        "codes": [check.code for check in used],
        "why": "; ".join(check.title for check in used),
        "before": row.line.rstrip("\n") if isinstance(row, Bad) else row,
    }
    if after is not None:
        entry["after"] = after
    return entry


def _line(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _mended(row: Any, checks: Sequence[Check], report: Report) -> Any:
    """The row as it should be, None where it should go."""
    if isinstance(row, Bad) or any(check.fix == "remove" for check in checks):
        return None
    for check in checks:
        if check.mend is not None:
            row = _texts(row, check.mend, 0)
        elif check.code in (structure.UNANSWERED, structure.EMPTY_SYSTEM):
            row = _turns(row, check.code)
        elif check.code == labels.SPELLING:
            row = _spelling(row, report)
    return row


def _texts(value: Any, mend: Callable[[str], str], depth: int) -> Any:
    if isinstance(value, str):
        return mend(value)
    if depth > _MAX_NESTED:
        return value
    if isinstance(value, dict):
        return {key: _texts(item, mend, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item, mend, depth + 1) for item in value]
    return value


def _turns(row: dict[str, Any], code: str) -> dict[str, Any]:
    """Cut what follows the last answer, or take an empty system message away."""
    out = dict(row)
    for name, value in row.items():
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            continue
        turns = list(value)
        if code == structure.EMPTY_SYSTEM:
            first = turns[0]
            text = first.get("content", first.get("value"))
            if first.get("role", first.get("from")) == "system" and not str(text or "").strip():
                turns = turns[1:]
        else:
            answers = ("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard")
            while (
                turns and str(turns[-1].get("role", turns[-1].get("from"))).lower() not in answers
            ):
                turns.pop()
        out[name] = turns
    return out


def _spelling(row: dict[str, Any], report: Report) -> dict[str, Any]:
    better = labels.spelt_alike(report.outline.labels)
    return {
        key: better.get(value, value) if isinstance(value, str) else value
        for key, value in row.items()
    }
