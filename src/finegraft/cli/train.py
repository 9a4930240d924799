"""``finegraft train``, and what every command that trains shares.

What: a configuration from YAML, ``--set`` and flags, in rising order, handed to
``training.run.train``. How: the flags come from the schema; the listener draws; the result is shown
with what can be typed next. Constraint: no default and no rule about training stands here.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from finegraft.cli.flags import overrides, with_schema_flags
from finegraft.cli.help import Help
from finegraft.cli.output import (
    STATUS_INTERRUPTED,
    Output,
    Stopped,
    quiet_datasets,
    quiet_libraries,
)
from finegraft.cli.progress import Picture, clock, progress
from finegraft.cli.tables import measures
from finegraft.core.errors import StorageError
from finegraft.core.process import bounded_memory, keep_freed_memory
from finegraft.core.schema import TrainConfig, build, from_file

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run_training(out: Output, config: TrainConfig, *, resume: bool = False) -> Any:
    """Train with progress on stderr and return the ``RunResult``."""
    keep_freed_memory()
    with terminable():
        with out.busy("starting"), quiet_libraries():
            from finegraft.training import run
        with (
            quiet_libraries(),
            quiet_datasets(),
            progress(out.err) as listener,
            _way_on(listener.picture, config.output),
            bounded_memory(),
        ):
            return run.train(config, listener=listener, resume=resume)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, so that what was begun is removed on the way out."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped("SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _way_on(picture: Picture, folder: str) -> Iterator[None]:
    """Give what ends the training itself early the command that goes on with it."""
    try:
        yield
    except (StorageError, KeyboardInterrupt) as end:
        if picture.phase not in ("training", "saving"):
            raise
        fix = resume_command(folder)
        if isinstance(end, KeyboardInterrupt):
            raise Stopped(getattr(end, "by", "Ctrl-C"), fix) from None
        fix = f"free some space, then: {fix}"
        raise StorageError(end.code, end.found, allowed=end.allowed, fix=fix) from end


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
        **({"metrics": metrics} if (metrics := getattr(result, "metrics", None)) else {}),
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
    if metrics := getattr(result, "metrics", None):
        to.print(measures(metrics))
    line(f"Saved in {result.run}" + (f", adapter in {result.adapter}" if result.adapter else ""))
    line("\nNext:")
    run = shlex.quote(str(result.run))
    if getattr(result, "task", "causal").endswith("classification"):
        line(f'  finegraft predict {run} "your text"', "bold")
        return
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
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Choose micro-batch, recomputation and precision that fit."),
    ] = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on a file of rows.

    A flag wins over --set, and --set over the file. For example:

      finegraft train --model demo --data rows.jsonl --output runs/first
    """
    values = overrides(assignments or [], flags)
    settings = from_file(config, values) if config else build(values, "the command line")
    if fit:
        from finegraft.cli.plan import choose

        settings = choose(ctx.obj, settings)
    finish(ctx.obj, run_training(ctx.obj, settings))


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(train)
