"""Rows before and after training, and what was forgotten, as sections of the page.

What: the ``before_after`` event in words: the mean with its interval, the rows that gained and lost
most, general texts. How: differences are after minus before, so that less is better for losses.
Constraint: an interval that holds 0 is called no difference. Trade-off: thirty rows tell a large
difference only, and the interval says how large.

Units: nats a labelled token.
"""

from __future__ import annotations

from typing import Any

from finegraft.core.page import Markup, Section, code, escape, fold, paragraph, table, tiles
from finegraft.training.report.read import Event, History

_MOST = 5  # rows shown on each side
_LANDSLIDE = 0.5  # nats a token


def before_after(told: History) -> Section | None:
    """Held-out rows; None for a run that did not come so far."""
    event = told.last("before_after")
    if not event:
        return None
    together, pairs = event.get("held_out"), event.get("rows") or []
    if not together:
        reason = event.get("skipped") or "too few rows were measured"
        return Section("Before and after", paragraph(f"Not measured: {reason}."))
    low, high = together["interval"]
    lines: list[tuple[str, object, str]] = [
        ("before", f"{together['before']:.3f}", "adapter disabled"),
        ("after", f"{together['after']:.3f}", ""),
        ("difference", f"{together['difference']:+.3f}", f"95% from {low:+.3f} to {high:+.3f}"),
    ]
    words = (
        f"{_verdict(low, high)} Loss of {together['count']} of {event.get('of', '?')} held-out "
        "rows, each with the adapter on and off; the interval is a bootstrap over rows."
    )
    ordered = sorted(pairs, key=_gain)
    better = [pair for pair in ordered if _gain(pair) < 0][:_MOST]
    worse = [pair for pair in reversed(ordered) if _gain(pair) > 0][:_MOST]
    body = tiles(lines) + paragraph(words)
    for title, part in (("Largest gains", better), ("Largest losses", worse)):
        if part:
            body += f"<h3>{title}</h3>" + "".join(_row(pair) for pair in part)
    if not worse:
        body += paragraph("No row of these became worse.")
    every = [
        (pair["row"], *(Markup(f"{v:.3f}") for v in (pair["before"], pair["after"])), _signed(pair))
        for pair in sorted(pairs, key=lambda pair: pair["row"])
    ]
    head = ("row", "before", "after", "difference")
    body += fold(f"All {len(pairs)} rows", table(head, every, label="rows before and after"))
    if event.get("skipped"):
        body += paragraph(f"Note: {event['skipped']}.", soft=True)
    return Section("Before and after", body)


def _verdict(low: float, high: float) -> str:
    if high < 0:
        return "Training helped on rows that it has not seen."
    if low > 0:
        return "Training made rows worse that it has not seen."
    return "No difference can be told on rows that training has not seen."


def _gain(pair: Event) -> float:
    return float(pair["after"] - pair["before"])


def _signed(pair: Event) -> str:
    return f"{_gain(pair):+.3f}"


def _row(pair: Event) -> str:
    """One row, folded: its numbers outside, its words inside."""
    numbers = f"{pair['before']:.3f} to {pair['after']:.3f} ({_signed(pair)})"
    hint = escape((pair["answer"] or pair["prompt"]).replace("\n", " ")[:60])
    inside = "".join(
        f"<p><b>{name}</b></p>{code(pair[key])}"
        for name, key in (("Given", "prompt"), ("To answer", "answer"))
        if pair.get(key)
    )
    return fold(f"row {pair['row']}: {numbers} <span class='soft'>{hint}</span>", inside)


def general(told: History) -> Section | None:
    """General texts: what the tuned model makes of them; None where there were none."""
    event = told.last("before_after")
    together, pairs = event.get("general"), event.get("texts") or []
    if not together:
        return None
    low, high = (-v for v in reversed(together["interval"]))  # log-probability: more is better
    change = -together["difference"]
    words = (
        "Mean log-probability of a token in built-in general texts: a small check of what was "
        f"forgotten. {_forgotten(change, low, high)}"
    )
    numbers: list[tuple[str, object, str]] = [
        ("before", f"{-together['before']:.3f}", "adapter disabled"),
        ("after", f"{-together['after']:.3f}", ""),
        ("change", f"{change:+.3f}", f"95% from {low:+.3f} to {high:+.3f}"),
    ]
    lines: list[tuple[Any, ...]] = [
        (
            pair["text"].replace("\n", " ")[:90],
            *(f"{-pair[k]:.3f}" for k in ("before", "after")),
            f"{-_gain(pair):+.3f}",
        )
        for pair in sorted(pairs, key=_gain, reverse=True)
    ]
    head = ("text", "before", "after", "change")
    body = tiles(numbers) + paragraph(words)
    body += fold(
        f"All {len(pairs)} texts, the largest losses first",
        table(head, lines, label="general texts"),
    )
    return Section("General texts", body)


def _forgotten(change: float, low: float, high: float) -> str:
    if high < 0 and change < -_LANDSLIDE:
        return (
            "The model has unlearnt a good deal: fewer steps, a lower learning rate or some "
            "general rows in the data keep more."
        )
    if high < 0:
        return "They became a little less likely, which is usual."
    if low > 0:
        return "They became more likely."
    return "No change can be told."
