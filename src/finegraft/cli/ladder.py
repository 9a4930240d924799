"""``finegraft ladder``: the same rows through several methods, side by side.

What: settings as for ``finegraft train`` plus names of methods, handed to ``training.ladder``. How:
the listener draws which rung of how many and the time left; the result is a table, a sentence and
the places of chart and report. Constraint: a stopped ladder says the command that goes on with it.
Trade-off: bars show the steps of a rung, not its loading, which takes some seconds of each.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from finegraft.cli.flags import overrides, with_schema_flags
from finegraft.cli.help import Help
from finegraft.cli.output import Output, Stopped, quiet_datasets, quiet_libraries
from finegraft.cli.progress import clock
from finegraft.core.errors import ConfigError, ModelError
from finegraft.core.schema import parse_assignment, read_file

PLAIN_EVERY_SECONDS = 10.0
_NARROW = 110  # columns from which the whole table fits


class Bars:
    """Listener: two bars in a terminal, a line now and then elsewhere.

    Attributes:
        whole: What the first bar is of.
        one: What the second is of.
    """

    whole, one = "ladder", "rung"

    def __init__(self, console: Console):
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
        )
        self.bars = Progress(*columns, console=console, transient=True)
        self.ladder = self.bars.add_task(self.whole, total=None, words="")
        self.rung = self.bars.add_task("", total=None, words="")
        self.shown_at = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        left = event.get("ladder_seconds")
        words = f"about {clock(left)} left" if left is not None else ""
        self.bars.update(self.ladder, total=event["of"], completed=event["number"] - 1, words=words)
        name = f"{self.one} {event['number']} of {event['of']}: {event['method']}"
        if event["type"] == "rung":
            self.bars.reset(self.rung, description=event["method"], total=None, words="loading")
            after = f", {words}" if words else ""
            self.line(f"{name}, {event['how']}{after}")
        elif event["type"] == "step":
            self._step(event, name, words)
        elif event["type"] == "notice":
            self.line(event["message"], "yellow")
        elif event["type"] == "phase" and event["name"] != "training":
            self.bars.update(self.rung, words=event["name"])

    def _step(self, event: dict[str, Any], name: str, words: str) -> None:
        loss = f"loss {event['loss']:.4f}"
        done, total = event["step"], event["total_steps"]
        own = f"{loss}, {clock(event.get('eta_seconds'))} left"
        self.bars.update(self.rung, total=total, completed=done, words=own)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.shown_at >= PLAIN_EVERY_SECONDS:
            self.shown_at = now
            self.line(f"{name}, step {done}/{total}, {loss}, {words} in all")

    def line(self, words: str, style: str = "") -> None:
        """Write a line above the bars."""
        self.console.print(words, style=style, markup=False, soft_wrap=True)


@contextlib.contextmanager
def showing(shown: Bars) -> Iterator[Bars]:
    """Draw the bars for the block, where there is a terminal."""
    if shown.console.is_terminal:
        shown.bars.start()
    try:
        yield shown
    finally:
        shown.bars.stop()


def _names(text: str | list[str]) -> list[str]:
    parts = text.split(",") if isinstance(text, str) else text
    return [part.strip() for part in parts if str(part).strip()]


def _per_method(texts: list[str]) -> dict[str, dict[str, Any]]:
    """Read ``dora.r=8`` and so on.

    Raises:
        ConfigError: FG-LADDER-009, no method's name before the key; FG-CONF-004, no value.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        method, dot, rest = text.partition(".")
        if not dot or "=" in method:
            raise ConfigError(
                "FG-LADDER-009",
                f"--method-set got {text!r}",
                allowed="METHOD.KEY=VALUE",
                fix="for example --method-set dora.r=8",
            )
        key, value = parse_assignment(rest)
        found.setdefault(method.strip(), {})[key] = value
    return found


def _table(values: dict[str, Any], width: int) -> Table:
    from finegraft.training import ladder_report

    measure, chosen = values["measure"], values["recommendation"]["method"]
    titles = ladder_report.titles(measure)
    # what an 80-column terminal does without is in the report
    left_out = {"share", "rate", ladder_report.second_measure(measure).replace("_", " ")}
    shown = [i for i, t in enumerate(titles) if width >= _NARROW or t not in left_out]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i in shown:
        table.add_column(titles[i], justify="right" if i else "left", no_wrap=True)
    for rung in values["rungs"]:
        if rung["error"]:
            table.add_row(Text(rung["method"]), "-", style="dim")
            continue
        cells = ladder_report.cells(rung, measure)
        style = "bold green" if rung["method"] == chosen else ""
        table.add_row(*(Text(cells[i]) for i in shown), style=style)
    return table


def _show(values: dict[str, Any], to: Console) -> None:
    def line(words: str, style: str = "") -> None:
        to.print(words, style=style, markup=False, soft_wrap=True)

    to.print(_table(values, to.width))
    for rung in values["rungs"]:
        if error := rung["error"]:
            line(f"{rung['method']}: {error['code']}: {error['found']}", "yellow")
    chosen, folder = values["recommendation"], Path(values["ladder"])
    line(f"\nRecommended: {chosen['method'] or 'none'}. {chosen['reason']}", "bold")
    line(f"Chart and report: {folder / 'ladder.png'}, {folder / 'report.md'}")
    if not chosen["method"]:
        return
    line("\nNext:")
    run = shlex.quote(str(folder / chosen["method"]))
    command = "predict" if values["task"] == "classification" else "chat"
    line(f"  finegraft {command} {run}" + (' "your text"' if command == "predict" else ""), "bold")


@with_schema_flags
def ladder(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Settings, one key a line.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", metavar="NAME,NAME", help="Methods to compare; unset: six for the task."
        ),
    ] = None,
    method_set: Annotated[
        list[str] | None,
        typer.Option("--method-set", metavar="METHOD.KEY=VALUE", help="One setting of one method."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting of the file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Compare methods of tuning on your rows.

    Each is a run of its own; the same command goes on where it was stopped. For example:

      finegraft ladder --model demo --data rows.jsonl --methods lora,dora,ia3
    """
    out: Output = ctx.obj
    values = {**(read_file(config) if config else {}), **overrides(assignments or [], flags)}
    written = values.pop("methods", None)
    chosen = _names(methods) if methods is not None else written and _names(written)
    per_method = {name: dict(keys) for name, keys in values.pop("per_method", {}).items()}
    for name, keys in _per_method(method_set or []).items():
        per_method[name] = {**per_method.get(name, {}), **keys}
    with out.busy("starting"), quiet_libraries(), quiet_datasets():
        from finegraft.training import ladder as comparing

        planned = comparing.plan(values, chosen, per_method)
    folder = planned.folder
    again = f"finegraft ladder {shlex.quote(str(folder / 'ladder.yaml'))}"
    steps = planned.config.max_steps
    length = f"{steps:,} steps" if steps > 0 else f"{planned.config.num_train_epochs:g} epochs"
    rows = planned.data["counts"]["rows"]
    out.note(f"{len(planned.rungs) - 1} methods, {length} of {rows:,} rows each, in {folder}")
    try:
        with quiet_libraries(), showing(Bars(out.err)) as listener:
            found = comparing.climb(planned, listener=listener)
    except KeyboardInterrupt as stop:
        raise Stopped(getattr(stop, "by", "Ctrl-C"), again) from None
    out.result(found, lambda to: _show(found, to))
    if all(rung["error"] for rung in found["rungs"][1:]):
        raise ModelError(
            "FG-LADDER-010",
            f"none of the {len(found['rungs']) - 1} methods was trained",
            fix=f"see the reasons in {folder / 'report.md'}",
        )


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(ladder)
