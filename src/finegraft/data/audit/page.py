"""The report of an audit as one HTML file.

How: ``core.page`` and ``core.charts``. Constraint: what looks like a secret is never in it, because
findings quote only its first four characters and no whole row is shown.
"""

from __future__ import annotations

from importlib import metadata

from finegraft.core import charts, page
from finegraft.core.page import Markup, Section, badge, escape, fold
from finegraft.data.audit._contract import SEVERITIES, Finding
from finegraft.data.audit.report import GOOD, LOOK, STOP, Report

_TONE = {GOOD: "good", LOOK: "warning", STOP: "error"}
_WORDS = {
    GOOD: "Nothing stands against training on these rows.",
    LOOK: "Training works; the rows below are worth a look first.",
    STOP: "Mend or remove the rows under the errors below before you train.",
}
_MOST_ROWS = 2000  # numbers written out for one finding
_NAMES = {"error": "errors", "warning": "warnings", "note": "notes"}


def html(report: Report) -> str:
    """The whole document."""
    tone = _TONE[report.verdict]
    lead = (
        f'<p class="{tone}"><strong>{escape(report.verdict.capitalize())}.</strong> '
        f"{escape(_WORDS[report.verdict])}</p>{_tiles(report)}"
    )
    sections = [Section("Findings", _findings(report)), Section("Charts", _charts(report))]
    if report.outline.labels:
        sections.append(Section("Labels", _labels(report)))
    footer = f"finegraft {metadata.version('finegraft')} data check, layout {report.layout}"
    return page.page(f"Data check: {report.source}", sections, lead=lead, tone=tone, footer=footer)


def _tiles(report: Report) -> str:
    counts = report.counts()
    values: list[tuple[str, object, str]] = [
        ("rows", report.rows, ""),
        ("rows without a finding", report.clean_rows, "notes do not count"),
        ("errors / warnings / notes", " / ".join(str(counts[s]) for s in SEVERITIES), "findings"),
    ]
    if report.tokens is not None:
        told = "estimated from a sample" if report.tokens.sampled else ""
        values.append(("tokens", report.tokens.total(report.tokens.lengths), told))
        values.append(("trained tokens", report.trained_tokens or 0, told))
    return page.tiles(values)


def _findings(report: Report) -> str:
    if not report.findings:
        return page.paragraph("None.")
    return "".join(_finding(finding, place == 0) for place, finding in enumerate(report.findings))


def _finding(finding: Finding, opened: bool) -> str:
    check = finding.check
    rows = finding.rows
    count = f"{len(rows):,} row{'s' * (len(rows) != 1)}" if rows else "all rows together"
    summary = (
        f"{badge(check.severity, check.severity)}<strong>{escape(check.title)}</strong> "
        f'<span class="soft">{count}, {check.code}</span>'
    )
    parts = []
    if finding.note:
        parts.append(page.paragraph(finding.note))
    parts.append(page.paragraph(check.cause))
    parts.append(f"<p><strong>What to do:</strong> {escape(check.cure)}</p>")
    if finding.details:
        shown = [(row, Markup(f"<code>{escape(t)}</code>")) for row, t in finding.details.items()]
        parts.append(page.table(("row", "what stands there"), shown, label=check.title))
    if len(rows) > len(finding.details):
        numbers = ", ".join(str(row) for row in rows[:_MOST_ROWS])
        more = f" and {len(rows) - _MOST_ROWS:,} more, see --json" if len(rows) > _MOST_ROWS else ""
        parts.append(f"<p><strong>Rows:</strong> {numbers}{more}</p>")
    return fold(summary, "".join(parts), opened=opened)


def _charts(report: Report) -> str:
    counts = report.counts()
    by_severity = charts.bars(
        "Findings",
        {_NAMES[s]: counts[s] for s in SEVERITIES},
        tones={_NAMES[s]: s for s in SEVERITIES},
    )
    hit = {f.check.title: len(f.rows) for f in report.findings if f.rows}
    tones = {f.check.title: f.check.severity for f in report.findings}
    often = dict(sorted(hit.items(), key=lambda item: -item[1])[:12])
    parts = [by_severity]
    if often:
        parts.append(charts.bars("Rows by finding", often, tones=tones))
    if report.tokens is not None and report.tokens.lengths:
        counted = report.tokens
        mark = (float(counted.max_length), f"max_length {counted.max_length:,}")
        lengths = charts.histogram("Tokens of a row", counted.lengths, unit="tokens", mark=mark)
        shares = [100 * t / n for t, n in zip(counted.trained, counted.lengths, strict=True) if n]
        share = charts.histogram("Trained share of a row", shares, bins=20, unit="%")
        parts += [lengths, share]
    elif report.outline.answer_chars:
        parts.append(
            charts.histogram("Length of an answer", report.outline.answer_chars, unit="characters")
        )
    if report.outline.languages:
        parts.append(
            charts.bars("Languages of the answers", report.outline.languages, unit=" rows")
        )
    return f'<div class="pair">{"".join(parts)}</div>'


def _labels(report: Report) -> str:
    return charts.bars("Rows of each label", report.outline.labels)
