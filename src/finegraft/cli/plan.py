"""``finegraft plan``: memory, time and disk of a run, before it runs.

What: a forecast of a configuration, and the command that would fit where it does not. How:
``training.plan`` counts; ``--probe`` takes some real steps in a folder that is thrown away.
Constraint: without ``--probe`` no weight is loaded. Trade-off: with it the model is loaded once
more than the run itself needs.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from finegraft.cli.flags import overrides, with_schema_flags
from finegraft.cli.help import Help
from finegraft.cli.output import Output, only_warnings, quiet_datasets, quiet_libraries
from finegraft.cli.progress import clock, progress, size
from finegraft.core.errors import ConfigError
from finegraft.core.process import keep_freed_memory
from finegraft.core.schema import TrainConfig, build, from_file

if TYPE_CHECKING:
    from finegraft.training.plan import Choice, Forecast, Study

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@with_schema_flags
def plan(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Settings, one key a line.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting of the file."),
    ] = None,
    real_steps: Annotated[
        bool,
        typer.Option("--probe", help="Take five or more real steps, and correct the forecast."),
    ] = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Say what a run would take: memory, time and disk.

    Takes what `finegraft train` takes. For example:

      finegraft plan --model demo --data rows.jsonl
    """
    values = overrides(assignments or [], flags)
    settings = from_file(config, values) if config else build(values, "the command line")
    out: Output = ctx.obj
    keep_freed_memory()  # as training does, whose peak is asked for
    with out.busy("starting"), quiet_libraries(), quiet_datasets():
        from finegraft.training import plan as plans
        from finegraft.training.run import require_own_keys

        require_own_keys(settings)
    with out.busy("counting"), quiet_libraries(), quiet_datasets(), only_warnings():
        studied = plans.study(settings)
        made = studied.of(settings)
    if real_steps:
        made = _probed(out, studied)
    advice = None if made.fits else _advice(studied)
    words = _command(config, assignments or [], flags, advice)
    answer = {**made.as_dict(), **({"fitting": advice.changed} if advice else {})}
    if words:
        answer["command"] = words
    out.result(answer, lambda to: _show(made, advice, words, to))


def _probed(out: Output, studied: Study) -> Forecast:
    from finegraft.training import plan as plans

    with quiet_libraries(), quiet_datasets(), progress(out.err) as listener:
        return plans.probe(studied, listener)


def _advice(studied: Study) -> Choice | None:
    """Settings that would fit, or None where there are none."""
    from finegraft.training import plan as plans

    try:
        return plans.fitting(studied.config, studied)
    except ConfigError as error:
        if error.code != "FG-PLAN-001":
            raise
        return None


def _command(
    config: Path | None, assignments: list[str], flags: dict[str, Any], advice: Choice | None
) -> str | None:
    """The command that trains what fits."""
    if advice is None:
        return None
    words = ["finegraft", "train", *([str(config)] if config else [])]
    words += [word for text in assignments for word in ("--set", text)]
    changed = advice.changed
    for name, value in flags.items():
        if value in (None, []) or name in changed:
            continue
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                words.append(flag if one else f"--no-{flag[2:]}")
            else:
                words += [flag, str(one)]
    return f"{shlex.join(words)} {advice.as_flags()}"


def _show(made: Forecast, advice: Choice | None, command: str | None, to: Console) -> None:
    def line(words: str, style: str = "") -> None:
        to.print(words, style=style, markup=False, soft_wrap=True)

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in made.parts.items():
        if count:
            table.add_row(name, size(count))
    table.add_row("peak memory", f"{size(made.peak_memory_bytes)}", style="bold")
    to.print(table)
    line(f"of {size(made.available_bytes)} there is on the {made.device}")
    took = ", ".join(f"{name} {clock(s)}" for name, s in made.seconds_parts.items() if s >= 0.5)
    line(f"\n{made.steps:,} steps, {made.tokens:,} tokens: {clock(made.seconds)} ({took})")
    disk = ", ".join(f"{name} {size(count)}" for name, count in made.disk_parts.items())
    line(f"disk: {size(made.disk_bytes)} ({disk})")
    if not made.probed:
        line("computed, not measured; --probe takes five real steps", "dim")
    if not made.counted:
        line("this model's layers could not be tried; usual figures stand for them", "yellow")
    if made.fits:
        line("\nIt fits.", "green")
        return
    line("\nIt does not fit.", "red")
    if advice is None:
        line("No smaller micro-batch, recomputation or 4-bit base would: take a smaller model,")
        line("or a smaller --max-length.")
        return
    for words in advice.why:
        line(f"  {words}")
    line("This would:")
    line(f"  {command}", "bold")


def choose(out: Output, config: TrainConfig) -> TrainConfig:
    """Settings for ``config`` that fit, told; for ``finegraft train --fit``.

    Raises:
        ConfigError: FG-PLAN-001, nothing fits.
    """
    with out.busy("choosing what fits"), quiet_libraries(), quiet_datasets(), only_warnings():
        from finegraft.training import plan as plans

        chosen = plans.fitting(config)
    peak, there = size(chosen.after.peak_memory_bytes), size(chosen.after.available_bytes)
    words = chosen.as_flags() or "nothing changed"
    out.err.print(f"--fit: {words}; {peak} of {there}", style="green", markup=False, soft_wrap=True)
    for why in chosen.why:
        out.err.print(f"  {why}", markup=False, soft_wrap=True)
    return chosen.config


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(plan)
