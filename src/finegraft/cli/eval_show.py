"""What ``finegraft eval`` shows: tables of measures, pairs of answers, rows worth reading.

Constraint: everything shown is in the JSON object as well. Trade-off: texts are cut to a line here;
``report/eval.json`` has them whole.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finegraft.cli.output import Output

PROGRESS_AFTER_SECONDS = 2.0
_WIDEST = 160  # characters of a text
_SHARES = ("exact_match", "accuracy")
_STYLES = {"better": "green", "worse": "red", "unclear": "dim"}


@contextlib.contextmanager
def progress(out: Output, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what draws progress, in a terminal and once two seconds have passed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=out.err, transient=True)
    tasks: dict[str, Any] = {}
    started = time.monotonic()

    def show(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(f"{what} ({name})", total=of)
        if out.err.is_terminal and time.monotonic() - started >= PROGRESS_AFTER_SECONDS:
            bar.start()
        bar.update(tasks[what], completed=done)

    try:
        yield show
    finally:
        bar.stop()


def _number(name: str, value: float, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if name in _SHARES:
        return f"{100 * value:{sign}.1f}%"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _with_interval(name: str, value: float, interval: list[float], signed: bool = False) -> Text:
    """The value, and its interval in a line below: three such columns fit 80 characters."""
    low, high = (_number(name, x, signed) for x in interval)
    return Text(_number(name, value, signed)).append(f"\n({low} to {high})", "dim")


def _measures(values: dict[str, Any]) -> Table:
    """One line a measure, with 95% intervals in brackets."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    versus = values.get("versus")
    heads = ["", values["model"], *([versus, "difference", ""] if versus else [])]
    for head in heads:
        table.add_column(Text(str(head)), overflow="fold")
    for name, one in values["metrics"].items():
        cells = [
            Text(f"{name.replace('_', ' ')}\n"),
            _with_interval(name, one["value"], one["interval"]),
        ]
        if versus:
            cells.append(_with_interval(name, one["other"], one["other_interval"]))
        if versus and "difference" in one:
            gap = _with_interval(name, one["difference"], one["difference_interval"], signed=True)
            cells += [gap, Text(one["change"], _STYLES[one["change"]])]
        table.add_row(*cells)
    return table


def _line(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _WIDEST else line[:_WIDEST] + "..."


_TITLES = {
    "gains": "Gained most",
    "losses": "Lost most",
    "worst": "Farthest from the reference",
}


def _examples(values: dict[str, Any], to: Console) -> None:
    for kind, rows in values.get("examples", {}).items():
        if not rows:
            continue
        to.print(f"\n{_TITLES[kind]} ({rows[0]['by'].replace('_', ' ')})", style="bold")
        for row in rows:
            score = _number(row["by"], row["score"])
            if "other_score" in row:
                score = f"{_number(row['by'], row['other_score'])} -> {score}"
            lines = [("asked", row["prompt"]), ("right", row["reference"])]
            if "other_answer" in row:
                lines.append((values["versus"], row["other_answer"]))
            lines.append(("said", row["answer"]))
            to.print(f"  row {row['row']}: {score}", highlight=False)
            for label, text in lines:
                if text is not None:
                    words = _line(text) or "(nothing)"
                    to.print(Text(f"    {label}: ", "dim").append(words, "default"))


def show(values: dict[str, Any], to: Console) -> None:
    """Print an evaluation for people."""
    data = values["data"]
    words = f"On {data['rows']:,} held-out rows: {data['origin']}."
    if data["trained_on_left_out"]:
        words += (
            f" {data['trained_on_left_out']:,} of {data['of']:,} are left out: "
            "they were trained on."
        )
    to.print(words, markup=False, highlight=False, soft_wrap=True)
    for note in data["notes"]:
        to.print(f"Note: {note}.", style="dim", markup=False, soft_wrap=True)
    to.print()
    to.print(_measures(values))
    pairs = values.get("pairwise")
    if pairs:
        low, high = (f"{100 * x:.0f}" for x in pairs["interval"])
        to.print(
            f"\nCloser to the reference ({pairs['by']}): {pairs['wins']} answers of "
            f"{values['model']}, {pairs['losses']} of {values['versus']}, {pairs['ties']} ties: "
            f"{100 * pairs['win_rate']:.0f}% ({low} to {high}; 50 is a draw)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if values.get("measures"):
        from finegraft.cli.tables import measures

        to.print()
        to.print(measures(values["measures"]))
    _examples(values, to)
    for task, found in values.get("lm_eval", {}).items():
        numbers = [f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float)]
        to.print(f"{task}: {', '.join(numbers)}", markup=False, highlight=False, soft_wrap=True)
    to.print("\nIn brackets: 95% of what other rows of this kind would give.", style="dim")
    if values.get("report"):
        to.print(f"Every row: {values['report']}", style="dim", markup=False, soft_wrap=True)
