"""The page of a run: ``report/index.html``, drawn from ``events.jsonl``.

What: what came out, what went wrong, the curves, rows before and after, forecast against actual,
and with what the run was made. How: ``core.page`` and ``core.charts``; sections without material
are left out. Constraint: one file that opens from disk and asks no address for anything.
Trade-off: long runs are drawn from an even choice of their steps, which the page says.

Units: seconds, bytes, nats a token.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finegraft.core import charts
from finegraft.core.page import Markup, Section, badge, code, escape, fold, page, paragraph, table
from finegraft.core.page import tiles as tiles_of
from finegraft.core.paths import storage_error, write_whole
from finegraft.core.schema import TrainConfig
from finegraft.training.report import rows
from finegraft.training.report.read import Event, History, Summary, history, require_run, summary
from finegraft.training.report.words import clock, loss, size

NAME = "index.html"
_SMOOTHED_PARTS = 15
_TONES = {"finished": "good", "failed": "error", "killed": "error"}


def write(run: Path) -> Path:
    """Draw the page of a run and return its path.

    Raises:
        ConfigError: FG-RUN-020, no run there.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    target = require_run(run) / "report" / NAME
    try:
        target.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, target) from error
    write_whole(target, document(history(run), summary(run)))
    return target


def document(told: History, line: Summary) -> str:
    """The whole page as HTML."""
    sections = [
        _findings(told),
        _loss(told),
        _course(told),
        rows.before_after(told),
        rows.general(told),
        _forecast(told),
        _setup(told),
    ]
    found = [e for e in told.of("watch")]
    tone = "warning" if found and line.state == "finished" else _TONES.get(line.state, "note")
    drawn = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return page(
        f"Run {line.name}",
        [section for section in sections if section],
        lead=_lead(told, line),
        tone=tone,
        footer=f"finegraft, drawn {drawn} from events.jsonl",
    )


def _lead(told: History, line: Summary) -> str:
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(line.started)) if line.started else "?"
    tone = _TONES.get(line.state, "note")
    what = f"{line.model or '?'}, {line.method or '?'}, {line.data or '?'}; started {begun}"
    steps = told.of("step")
    start, end = told.last("start"), told.last("end")
    first = steps[0]["loss"] if steps else None
    peak = end.get("peak_memory_bytes") or max(
        (e.get("memory_bytes") or 0 for e in steps), default=0
    )
    values: list[tuple[str, object, str]] = [
        ("steps", line.step, f"of {line.total_steps:,}" if line.total_steps else ""),
        ("loss", loss(line.loss), f"began at {loss(first)}" if first is not None else ""),
    ]
    if line.eval_loss is not None:
        held = told.of("eval")
        best = min((e["loss"] for e in held), default=line.eval_loss)
        values.append(("held-out loss", loss(line.eval_loss), f"best {loss(best)}"))
    values += [
        ("duration", clock(line.seconds), ""),
        ("speed", f"{line.tokens_per_second:,.0f}" if line.tokens_per_second else "?", "tokens/s"),
        ("memory", size(peak), "peak" if end.get("peak_memory_bytes") else "most, at logged steps"),
    ]
    if start.get("trainable"):
        share = start["trainable"] / max(start.get("parameters") or 0, 1)
        values.append(("trained", f"{start['trainable']:,}", f"parameters, {share:.2%} of all"))
    return f"<p>{badge(line.state, tone)}{escape(what)}</p>{tiles_of(values)}"


def _findings(told: History) -> Section | None:
    """What went wrong, and what was said about the rows."""
    parts = []
    failed = told.last("failed")
    if failed and failed.get("code") not in {e["code"] for e in told.of("watch")}:
        name = failed.get("code") or "error"
        parts.append(f"<p>{badge(name, 'error')}{escape(failed['message'])}</p>")
    for event in told.of("watch"):
        kind = "error" if event["severity"] == "error" else "warning"
        parts.append(
            f"<p>{badge(event['code'], kind)}{escape(event['message'])}.<br>"
            f"<b>Likely:</b> {escape(event['cause'])}.<br>"
            f"<b>Try:</b> {escape(event['cure'])}.</p>"
        )
    warnings = told.last("data").get("warnings") or []
    parts += [f"<p>{badge('rows', 'warning')}{escape(text)}</p>" for text in warnings]
    return Section("Findings", "".join(parts)) if parts else None


def _loss(told: History) -> Section | None:
    steps, held_out = told.of("step"), told.of("eval")
    if not steps:
        return None
    points = _points(steps, "loss")
    series = {"each step": points, "smoothed": _smoothed(points)}
    if held_out:
        series["held out"] = _points(held_out, "loss")
    body = charts.lines("Loss, nats a token", series, x_name="step")
    if told.stride > 1:
        body += paragraph(f"Every {told.stride}th logged step is drawn.", soft=True)
    bad = [e["step"] for e in steps if not _finite(e.get("loss"))]
    if bad:
        body += paragraph(f"The loss was not a number at step {', '.join(map(str, bad[:10]))}.")
    if held_out:
        lines = [(e["step"], Markup(loss(e["loss"])), _measured(e)) for e in held_out]
        head = ("step", "held-out loss", "measures")
        body += fold(f"{len(held_out)} evaluations", table(head, lines, label="evaluations"))
    return Section("Loss", body)


def _measured(event: Event) -> str:
    numbers = {k: v for k, v in event.get("metrics", {}).items() if isinstance(v, int | float)}
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in numbers.items())


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a fifteenth of the steps around each, so that the line does not lag."""
    points = [point for point in points if math.isfinite(point[1])]
    half = max(1, len(points) // _SMOOTHED_PARTS // 2)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    out = []
    for i, (step, _) in enumerate(points):
        near = min(half, i, len(points) - 1 - i)
        out.append((step, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return out


def _points(events: list[Event], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    return [(e["step"], e[key] * factor) for e in events if e.get(key) is not None]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _course(told: History) -> Section | None:
    """The four curves beside the loss."""
    steps = told.of("step")
    if not steps:
        return None
    drawn = []
    unit = _power_of_ten(e.get("learning_rate") for e in steps)
    for title, key, factor in (
        (f"Learning rate, in {unit:.0e}", "learning_rate", 1 / unit),
        ("Gradient norm, before clipping", "grad_norm", 1.0),
        ("Speed, tokens a second", "tokens_per_second", 1.0),
        ("Memory, GB", "memory_bytes", 1e-9),
    ):
        points = _points(steps, key, factor)
        if points:
            drawn.append(charts.lines(title, {title.split(",")[0].lower(): points}, x_name="step"))
    return Section("Course", f'<div class="pair">{"".join(drawn)}</div>') if drawn else None


def _power_of_ten(values: Iterable[float | None]) -> float:
    """The power of ten that the largest value begins with, so that axes need few digits."""
    most = max((abs(v) for v in values if v and math.isfinite(v)), default=1.0)
    return 10.0 ** math.floor(math.log10(most))


def _forecast(told: History) -> Section | None:
    """What was expected and what it was."""
    said, end = told.last("forecast"), told.last("end")
    words = {"peak_memory_bytes": ("peak memory", size), "seconds": ("duration", clock)}
    lines = []
    for key, (name, show) in words.items():
        if said.get(key) is None:
            continue
        actual = end.get(key)
        off = f"{actual / said[key] - 1:+.0%}" if actual and said[key] else ""
        lines.append((name, show(said[key]), show(actual) if actual else "not told", off))
    if not lines:
        return None
    head = ("", "forecast", "actual", "actual against forecast")
    body = table(head, lines, label="forecast")
    parts = said.get("parts") or {}
    if parts and all(isinstance(v, int | float) for v in parts.values()):
        named = {name.replace("_", " "): value / 1e6 for name, value in parts.items()}
        body += charts.bars("Forecast of memory by part", named, unit=" MB")
    return Section("Forecast and actual", body)


def _setup(told: History) -> Section:
    config, about = told.config, told.last("run")
    fields = TrainConfig.model_fields
    own = [
        (name, str(value))
        for name, value in config.items()
        if name not in fields or fields[name].is_required() or value != fields[name].default
    ]
    body = table(("setting", "value"), own, label="settings") if own else ""
    every = [(name, "" if value is None else str(value)) for name, value in config.items()]
    body += fold("All settings", table(("setting", "value"), every, label="all settings"))
    facts = {k: v for k, v in told.last("data").items() if isinstance(v, int | str)}
    facts = {k: v for k, v in facts.items() if k not in ("type", "time")}
    if facts:
        lines = [
            (k.replace("_", " "), f"{v:,}" if isinstance(v, int) else v) for k, v in facts.items()
        ]
        body += fold("Rows", table(("", ""), lines, label="rows"))
    for title, key in (("Versions", "versions"), ("Hardware", "hardware")):
        values = about.get(key) or {}
        if values:
            lines = [(name, _plain(name, value)) for name, value in values.items()]
            body += fold(title, table(("", ""), lines, label=title.lower()))
    body += paragraph("To compare this run with another:", soft=True)
    return Section("Set-up", body + code(f"finegraft compare {told.run} OTHER"))


def _plain(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value)
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
