"""``finegraft train`` and ``finegraft resume``.

What: a configuration from YAML, ``--set`` and flags, in rising order, handed to
``training.run.train``. How: the flags come from the schema; the listener draws; the result is shown
with what can be typed next. Constraint: no default and no rule about training stands here.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from finegraft.core.errors import ConfigError, StorageError, did_you_mean
from finegraft.core.process import keep_freed_memory
from finegraft.core.schema import TrainConfig, build, from_file

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run_training(out: Output, config: TrainConfig, *, resume: bool = False) -> Any:
    """Train with progress on stderr and return the ``RunResult``."""
    keep_freed_memory()
    with _terminable():
        with out.busy("starting"), quiet_libraries():
            from finegraft.training import run
        with (
            quiet_libraries(),
            quiet_datasets(),
            progress(out.err) as listener,
            _way_on(listener.picture, config.output),
        ):
            return run.train(config, listener=listener, resume=resume)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
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
    settings = _settings_of(run)
    done = _finished(run, settings)
    if done:
        ctx.obj.note(f"{run} is finished, so there is nothing to go on with.")
    finish(ctx.obj, done or run_training(ctx.obj, settings, resume=True))


def _finished(folder: Path, settings: TrainConfig) -> Any:
    """The result of a run whose last event is its end, or None when steps are left.

    Steps are left as well when the length in config.yaml was raised since.
    """
    file = folder / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    saved = next((p for p in (folder / "adapter", folder / "model") if p.is_dir()), None)
    if not events or events[-1]["type"] != "end" or not saved:
        return None
    end, start = events[-1], [e for e in events if e["type"] == "start"][-1]
    if end["step"] < settings.max_steps:
        return None
    if settings.max_steps <= 0 and start["epochs"] < settings.num_train_epochs:
        return None
    held_out = [e["loss"] for e in events if e["type"] == "eval"]
    return SimpleNamespace(
        run=folder,
        adapter=None if settings.trains_all else saved,
        steps=end["step"],
        total_steps=end["step"],
        loss=end["loss"],
        eval_loss=held_out[-1] if held_out else None,
        seconds=end["seconds"],
        tokens=end["tokens"],
        interrupted=False,
        task=settings.task,
        metrics=end.get("metrics"),
    )


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(cls=Help)(train)
    app.command(cls=Help)(resume)
