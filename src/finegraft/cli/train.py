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

from finegraft.cli import launch, on_ray
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
from finegraft.data import sources, stdin
from finegraft.data.stream_remote import is_url
from finegraft.models.locate import locate, looks_like_path

NodeRank = Annotated[
    int, typer.Option("--node-rank", metavar="K", help="With --nnodes: number of this machine.")
]
Rendezvous = Annotated[
    str,
    typer.Option(
        "--rendezvous", metavar="HOST:PORT", help="With --nnodes: where the machines meet."
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts",
        metavar="N",
        help="With --nproc: how often a lost process is answered by a new start.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run_training(
    out: Output,
    config: TrainConfig,
    *,
    resume: bool = False,
    machines: launch.Machines | None = None,
) -> Any:
    """Train with progress on stderr and return the ``RunResult``, or what a launched run says."""
    machines = machines or launch.Machines()
    launch.require_possible(config, machines)
    _require_there(config)
    if launch.wanted(config):
        return launch.run_launched(out, config, machines, resume=resume)
    keep_freed_memory()
    with terminable():
        with out.busy("starting"), quiet_libraries():
            from finegraft.training import run
        with (
            quiet_libraries(),
            quiet_datasets(),
            progress(out.err) as listener,
            way_on(listener.picture, config.output),
            bounded_memory(),
        ):
            return run.train(config, listener=listener, resume=resume)


def _require_there(config: TrainConfig) -> None:
    """Tell in half a second, and not after the libraries are loaded, that a file is not there.

    Raises:
        DataError, ModelError: of rows and of a model that are named by path; ``train`` finds the
            others.
    """
    for spec in filter(None, (config.data, config.eval_data)):
        for part in sources.parts(spec):
            if part.path != stdin.NAME and not is_url(part.path):
                sources.files(part)
    if looks_like_path(config.model) and not Path(config.model).expanduser().exists():
        locate(config.model, revision=config.revision)


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
def way_on(picture: Picture, folder: str) -> Iterator[None]:
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
    if getattr(result, "elsewhere", False):
        return {"run": str(result.run), "node": result.node}
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

    if getattr(result, "elsewhere", False):
        line(f"Machine {result.node} is done; machine 0 has the result.", "green")
        return
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
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = "",
    max_restarts: MaxRestarts = 3,
    ray: on_ray.Address = None,
    storage: on_ray.Storage = None,
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
    if ray is not None or storage is not None:
        finish(ctx.obj, on_ray.run_on_ray(ctx.obj, settings, ray, storage, max_restarts))
        return
    machines = launch.Machines(node_rank, rendezvous, max_restarts)
    finish(ctx.obj, run_training(ctx.obj, settings, machines=machines))


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(train)
