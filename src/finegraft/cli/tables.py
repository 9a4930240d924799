"""Tables of what a classifier was measured to do.

What: numbers in one line, precision and recall of each class, and the confusion matrix. How: rich,
from the dictionary that ``training.metrics`` makes. Constraint: at most ``MOST_CLASSES`` rows, the
most frequent first; the rest is in ``report/metrics.json``.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MOST_CLASSES = 20
_MATRIX_CLASSES = 8  # columns that fit 80 characters


def measures(metrics: dict[str, Any]) -> RenderableType:
    """Everything of ``metrics`` as one thing to print."""
    words = ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and name != "loss"
    )
    parts: list[RenderableType] = [Text(f"Held out: {words}")]
    classes: dict[str, dict[str, float]] = metrics.get("per_class") or {}
    if classes:
        parts.append(_classes(classes, metrics.get("confusion")))
    return Group(*parts)


def _classes(classes: dict[str, dict[str, float]], confusion: list[list[int]] | None) -> Table:
    """Quality by class; up to eight classes with how their rows were labelled."""
    names = list(classes)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    matrix = confusion if confusion and len(names) <= _MATRIX_CLASSES else None
    table.add_column("true label")
    for title in ("rows", "precision", "recall", "F1"):
        table.add_column(title, justify="right")
    for name in names if matrix else ():
        table.add_column(Text(f"as {name}"), justify="right", style="dim")
    order = sorted(range(len(names)), key=lambda i: -classes[names[i]]["rows"])
    for i in sorted(order[:MOST_CLASSES]):
        each = classes[names[i]]
        quality = (f"{each[key]:.3f}" for key in ("precision", "recall", "f1"))
        said = map(str, matrix[i]) if matrix else ()
        table.add_row(Text(names[i]), f"{each['rows']:,}", *quality, *said)
    return table
