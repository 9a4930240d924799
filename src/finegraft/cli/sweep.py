"""``finegraft sweep``: the same rows with several settings, one run after the other.

What: settings as for ``finegraft train``; ``--set`` with several values says what is varied. How:
``training.sweep`` trains and remembers; the listener draws which run of how many and the time left;
the result is a table, the best run and the place of the page. Constraint: a stopped sweep says the
command that goes on with it. Trade-off: ``--set`` splits at commas here, so a value that is a list
stands in brackets.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finegraft.cli.flags import given, with_schema_flags
from finegraft.cli.help import Help
from finegraft.cli.ladder import Bars, showing
from finegraft.cli.output import Output, Stopped, quiet_datasets, quiet_libraries
from finegraft.cli.progress import clock
from finegraft.core.errors import ConfigError, ModelError
from finegraft.core.schema import read_file

_OWN = ("sweep", "search", "trials")
_NARROW = 110  # columns from which everything fits


class _Bars(Bars):
    """Also one line for each run that is done."""

    whole, one = "sweep", "run"

    def __call__(self, event: dict[str, Any]) -> None:
        if event["type"] != "result":
            super().__call__(event)
            return
        row, best, left = event["row"], event["best"], event["ladder_seconds"]
        words = f"run {event['number']} of {event['of']}: {event['method']}: {_ending(row)}"
        if row["name"] == best["name"] and row["loss"] is not None:
            words += ", the best so far"
        if left and event["number"] < event["of"]:
            words += f"; about {clock(left)} left"
        self.line(words, "green" if row["state"] == "finished" else "yellow")


def _ending(row: dict[str, Any]) -> str:
    if row["error"]:
        return f"{row['error']['code']}: {row['error']['found']}"
    if row["state"] == "pruned":
        return f"stopped early at step {row['steps']} of {row['total_steps']}"
    name = "held-out loss" if row["eval_loss"] is not None else "training loss"
    loss = row["loss"] if row["loss"] is not None else float("nan")
    return f"{name} {loss:.4f} in {clock(row['seconds'])}"


def _varied(texts: list[str]) -> dict[str, str]:
    """Read ``r=8,16`` and so on.

    Raises:
        ConfigError: FG-SWEEP-010, no equals sign.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(
                "FG-SWEEP-010",
                f"--set got {text!r}",
                allowed="KEY=VALUE,VALUE,...",
                fix="for example --set r=8,16,32",
            )
        found[key.strip().replace("-", "_")] = value
    return found


def _table(values: dict[str, Any], width: int) -> Table:
    from finegraft.training.sweep.space import shown

    keys, held_out = list(values["varied"]), values["measure"] == "eval_loss"
    titles = [*keys, *(["held-out loss"] if held_out else []), "training loss", "steps", "time"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=width >= _NARROW)
    table.add_column("state")
    for row in values["runs"]:
        losses = [row["eval_loss"], row["train_loss"]] if held_out else [row["train_loss"]]
        cells = [shown(row["values"][key]) for key in keys]
        cells += ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        cells += [str(row["steps"] or "-"), clock(row["seconds"]) if row["seconds"] else "-"]
        best = values["best"] and row["name"] == values["best"]["name"]
        style = "bold green" if best else "" if row["state"] == "finished" else "dim"
        table.add_row(*map(Text, cells), Text(row["state"]), style=style)
    return table


def _show(values: dict[str, Any], to: Console) -> None:
    from finegraft.training.sweep.space import label

    def line(words: str, style: str = "") -> None:
        to.print(words, style=style, markup=False, soft_wrap=True)

    to.print(_table(values, to.width))
    for row in values["runs"]:
        if error := row["error"]:
            line(f"{label(row['values'])}: {error['code']}: {error['found']}", "yellow")
    best = values["best"]
    if best:
        words = "held-out" if values["measure"] == "eval_loss" else "training"
        line(f"\nBest: {label(best['values'])}, {words} loss {best['loss']:.4f}", "bold")
    for note in values["notes"]:
        line(note, "yellow")
    line(f"Chart and table: {Path(values['sweep']) / 'index.html'}")
    if best:
        run = shlex.quote(best["run"])
        text = str(values["task"]).endswith("classification")
        line("\nNext:")
        line(
            f'  finegraft predict {run} "your text"' if text else f"  finegraft chat {run}", "bold"
        )


def _asked(config: Path | None, assignments: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Everything that file, --set and flags say, the last of them on top.

    Raises:
        ConfigError: FG-SWEEP-010, FG-SWEEP-011.
    """
    values = read_file(config) if config else {}
    vary = values.get("sweep") or {}
    if not isinstance(vary, dict):
        raise ConfigError(
            "FG-SWEEP-010",
            f"sweep: {vary!r} in {config}",
            allowed="keys with values",
            fix="for example sweep: {r: [8, 16, 32]}",
        )
    typed, fixed = _varied(assignments), given(flags)
    both = sorted(set(fixed) & {*typed, *vary})
    if both:
        raise ConfigError(
            "FG-SWEEP-011",
            f"{', '.join(both)} is varied, and given one value by a flag as well",
            allowed="one of the two",
            fix=f"remove --{both[0].replace('_', '-')}",
        )
    shared = {key: value for key, value in {**values, **fixed}.items() if key not in _OWN}
    own = {key: values[key] for key in ("search", "trials") if key in values}
    return {"values": shared, "vary": {**vary, **typed}, **own}


@with_schema_flags
def sweep(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Settings, one key a line.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE,VALUE",
            help="Values to try; a search takes LEAST..GREATEST.",
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            "--search",
            metavar="NAME",
            help="grid: every combination; optuna: what promises most, hopeless runs stopped early "
            "[dim](default: grid)[/dim]",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", help="Runs of a search, 20 unasked.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Try several values of settings on your rows.

    Each combination is a run; the same command goes on where it was stopped. For example:

      finegraft sweep --model demo --data rows.jsonl --set r=8,16,32 --set learning_rate=1e-4,3e-4
    """
    out: Output = ctx.obj
    asked = _asked(config, assignments or [], flags)
    with out.busy("starting"), quiet_libraries(), quiet_datasets():
        from finegraft.training.sweep import planning, running

        planned = planning.plan(
            asked["values"],
            asked["vary"],
            searching=search or asked.get("search", "grid"),
            trials=trials or asked.get("trials"),
        )
    rows = planned.data["counts"]["rows"]
    keys = ", ".join(axis.key for axis in planned.space)
    by = "held-out loss" if planned.held_out else "training loss, since no rows are held out"
    out.note(f"{planned.count} runs of {rows:,} rows, varying {keys}, in {planned.folder}")
    out.note(f"ordered by the {by}")
    again = f"finegraft sweep {shlex.quote(str(planned.folder / 'sweep.yaml'))}"
    try:
        with quiet_libraries(), showing(_Bars(out.err)) as listener:
            found = running.sweep(planned, listener=listener)
    except KeyboardInterrupt as stop:
        raise Stopped(getattr(stop, "by", "Ctrl-C"), again) from None
    out.result(found, lambda to: _show(found, to))
    if not found["best"]:
        raise ModelError(
            "FG-SWEEP-012",
            f"none of the {planned.count} runs was trained to its end",
            fix=f"see the reasons in {planned.folder / 'index.html'}",
        )


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(sweep)
