"""``finegraft train`` and ``finegraft resume``.

What: a configuration from YAML, ``--set`` and flags, in rising order, handed to
``training.run.train``. How: the flags come from the schema; the listener draws; the result is shown
with what can be typed next. Constraint: no default and no rule about training stands here.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from finegraft.cli.flags import overrides, with_schema_flags
from finegraft.cli.help import Help
from finegraft.cli.output import STATUS_INTERRUPTED, Output, quiet_datasets, quiet_libraries
from finegraft.cli.progress import clock, progress
from finegraft.core.errors import ConfigError, did_you_mean
from finegraft.core.schema import TrainConfig, build, from_file

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run_training(out: Output, config: TrainConfig, *, resume: bool = False) -> Any:
    """Train with progress on stderr and return the ``RunResult``."""
    with out.busy("starting"), quiet_libraries():
        from finegraft.training import run
    with quiet_libraries(), quiet_datasets(), progress(out.err) as listener:
        return run.train(config, listener=listener, resume=resume)


def summary(result: Any) -> dict[str, Any]:
    """The keys that ``--json`` promises."""
    return {
        "run": str(result.run),
        "adapter": str(result.adapter) if result.adapter else None,
        "steps": result.steps,
        "total_steps": result.total_steps,
        "loss": result.loss,
        "eval_loss": result.eval_loss,
        "seconds": result.seconds,
        "tokens": result.tokens,
        "interrupted": result.interrupted,
    }


def resume_command(folder: Path | str) -> str:
    """What to type to go on with a run."""
    return f"finegraft resume {shlex.quote(str(folder))}"


def _show(result: Any, to: Console) -> None:
    def line(words: str, style: str = "") -> None:
        to.print(words, style=style, markup=False, soft_wrap=True)

    if result.interrupted:
        line(f"Stopped at step {result.steps} of {result.total_steps}. Go on with:", "yellow")
        line(f"  {resume_command(result.run)}", "bold")
        return
    losses = [f"loss {result.loss:.4f}"] if result.loss is not None else []
    if result.eval_loss is not None:
        losses.append(f"held-out loss {result.eval_loss:.4f}")
    done = [f"{result.steps} steps in {clock(result.seconds)}", f"{result.tokens:,} tokens"]
    line(", ".join([*done, *losses]), "green")
    line(f"Saved in {result.run}" + (f", adapter in {result.adapter}" if result.adapter else ""))
    line("\nNext:")
    run = shlex.quote(str(result.run))
    line(f"  finegraft chat {run}", "bold")
    line(f'  finegraft generate {run} "your question"', "bold")


def finish(out: Output, result: Any) -> None:
    """Show the result; a stopped run leaves with the status of Ctrl-C."""
    out.result(summary(result), lambda to: _show(result, to))
    if result.interrupted:
        raise typer.Exit(STATUS_INTERRUPTED)


@with_schema_flags
def train(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Settings, one key a line.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting of the file."),
    ] = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on a file of rows.

    A flag wins over --set, and --set over the file. For example:

      finegraft train --model demo --data rows.jsonl --output runs/first
    """
    values = overrides(assignments or [], flags)
    settings = from_file(config, values) if config else build(values, "the command line")
    finish(ctx.obj, run_training(ctx.obj, settings))


def _settings_of(folder: Path) -> TrainConfig:
    """Read the configuration that a run was started with.

    Raises:
        ConfigError: FG-RUN-001, no run there.
    """
    file = folder / "config.yaml"
    if file.is_file():
        settings = from_file(file)
        moved = Path(settings.output).resolve() != folder.resolve()
        return settings.model_copy(update={"output": str(folder)}) if moved else settings
    found = [path.parent for path in folder.parent.glob("*/config.yaml")]
    found = found or [path.parent for path in Path("runs").glob("*/config.yaml")]
    names = sorted(str(path) for path in found)
    raise ConfigError(
        "FG-RUN-001",
        f"no run in {folder}: it has no config.yaml",
        allowed=", ".join(names[:12]) or "a folder that `finegraft train` made",
        fix=f"finegraft resume RUN; {did_you_mean(str(folder), names)}"
        if names
        else "start one with: finegraft train --model demo --data ROWS.jsonl",
    )


def resume(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped."""
    finish(ctx.obj, run_training(ctx.obj, _settings_of(run), resume=True))


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(cls=Help)(train)
    app.command(cls=Help)(resume)
