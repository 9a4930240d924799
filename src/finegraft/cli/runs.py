"""``finegraft runs``, ``finegraft compare`` and ``finegraft report``.

What: a table of runs, what differs between two, and the page of one. How: everything comes from
``training.report``, which imports no torch, so that these answer at once. Constraint: nothing is
changed but ``report/index.html``. Trade-off: narrow terminals get fewer columns instead of cut
ones; ``--json`` has them all.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finegraft.cli.help import Help
from finegraft.cli.train import Json
from finegraft.core.errors import ConfigError

_STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
_STYLES |= {"killed": "red", "waiting": "cyan"}
_WIDE_COLUMNS = 120  # characters from which model, method and data have a place
_PIPE_COLUMNS = 200
_DAY_SECONDS = 86_400
_SHOWN_LETTERS = 40


def runs(
    ctx: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Where the runs lie; unset: runs/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: what became of each, its losses, speed and settings."""
    from finegraft.training.report import read

    place = folder or Path("runs")
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            "FG-RUN-023",
            f"{folder} is {'a file' if folder.exists() else 'not there'}",
            allowed="a folder with run folders in it",
            fix="finegraft runs, which lists those in runs/",
        )
    found = [read.summary(path) for path in read.runs(place)]
    found.sort(key=lambda run: -(run.started or 0.0))
    values = {"folder": str(place), "runs": [asdict(run) for run in found]}
    ctx.obj.result(values, lambda to: _list(found, place, to))


def _list(found: list[Any], place: Path, to: Console) -> None:
    if not found:
        words = (
            f"No runs in {place}. Start one with:\n  finegraft train --model demo --data ROWS.jsonl"
        )
        to.print(words, markup=False, soft_wrap=True)
        return
    width = to.width if to.is_terminal else _PIPE_COLUMNS
    wide = width >= _WIDE_COLUMNS
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", no_wrap=True)
    for title in ("steps", "loss", "held out", "tok/s", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("started", no_wrap=True)
    for title in ("model", "method", "data") if wide else ():
        table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=_SHOWN_LETTERS)
    for run in found:
        more = [Text(_end_of(text)) for text in (run.model, run.method, run.data)] if wide else []
        table.add_row(Text(_name(run.path, place)), *_cells(run), *more)
    wide_enough = to if to.is_terminal else Console(file=to.file, width=width, highlight=False)
    wide_enough.print(table)


def _name(path: Path, place: Path) -> str:
    return str(path) if path == place else str(path.relative_to(place))


def _end_of(text: str | None) -> str:
    """A long path by its end, which says more than its beginning."""
    text = text or ""
    return text if len(text) <= _SHOWN_LETTERS else f"…{text[-_SHOWN_LETTERS + 1 :]}"


def _cells(run: Any) -> list[Text]:
    from finegraft.training.report.words import clock, loss

    steps = f"{run.step:,}" + (f"/{run.total_steps:,}" if run.total_steps else "")
    state = f"{run.state} {run.error}" if run.error else run.state
    speed = f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else ""
    return [
        Text(state, style=_STYLES.get(run.state, "")),
        *(
            Text(words)
            for words in (
                steps,
                loss(run.loss) if run.loss is not None else "",
                loss(run.eval_loss) if run.eval_loss is not None else "",
                speed,
                clock(run.seconds) if run.seconds is not None else "",
                _when(run.started),
            )
        ),
    ]


def _when(started: float | None) -> str:
    if started is None:
        return ""
    recent = time.time() - started < _DAY_SECONDS
    return time.strftime("%H:%M" if recent else "%Y-%m-%d", time.localtime(started))


def compare(
    ctx: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Show what differs between two runs, and what of it matters."""
    from finegraft.training.report import differences

    found = differences.compare(a, b)
    ctx.obj.result(found, lambda to: _differences(found, to))


def _differences(found: dict[str, Any], to: Console) -> None:
    to.print(found["verdict"], style="bold", markup=False, soft_wrap=True)
    if found["differences"]:
        table = _two_sided("likely", "difference")
        table.add_column("why", overflow="fold")
        for each in found["differences"]:
            sides = (Text(_value(each[side])) for side in "ab")
            mark = Text("yes", style="yellow") if each["likely"] else Text("no", style="dim")
            table.add_row(mark, Text(each["name"]), *sides, Text(each["reason"], style="dim"))
        to.print()
        to.print(table)
    table = _two_sided("result")
    for each in found["results"]:
        table.add_row(Text(each["name"]), *(Text(_value(each[side])) for side in "ab"))
    to.print()
    to.print(table)
    if found["apart_from_step"]:
        to.print(f"\nThe losses part at step {found['apart_from_step']}.", markup=False)


def _two_sided(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in (*names, "A", "B"):
        table.add_column(name, overflow="fold", max_width=_SHOWN_LETTERS)
    return table


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if math.isfinite(value) and 0.01 <= abs(value) < 1e6 else f"{value:g}"


def report(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    as_json: Json = False,
) -> None:
    """Draw the page of a run, also of one that is still running."""
    from finegraft.training.report import page

    path = page.write(run)
    ctx.obj.result(
        {"run": str(run), "report": str(path)},
        lambda to: to.print(f"{path}", markup=False, soft_wrap=True),
    )


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (runs, compare, report):
        app.command(cls=Help)(command)
