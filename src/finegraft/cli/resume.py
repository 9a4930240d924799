"""``finegraft resume``: go on with a run that was stopped, or prove that it can be repeated.

What: a run folder, or the newest unfinished one in ``runs/``, is handed to ``training.run.train``;
with ``--verify`` to ``training.replay.verify``. How: ``config.yaml`` and ``events.jsonl`` say what
it is and whether it has ended. Constraint: a finished run is shown, never trained again, and its
result comes without importing torch. Trade-off: what may be edited in ``config.yaml`` is known
where runs are compared (``training.same``), not here.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console

from finegraft.cli import launch
from finegraft.cli.help import Help
from finegraft.cli.output import Output, quiet_datasets, quiet_libraries
from finegraft.cli.progress import clock, progress
from finegraft.cli.train import (
    Json,
    MaxRestarts,
    NodeRank,
    Rendezvous,
    finish,
    run_training,
    terminable,
)
from finegraft.core import alone
from finegraft.core.errors import ConfigError, FinegraftError, did_you_mean
from finegraft.core.journal import read_events
from finegraft.core.process import keep_freed_memory
from finegraft.core.schema import TrainConfig, from_file

RUNS = Path("runs")
STATUS_DIFFERENT = 1
_SHOWN = 10


def resume(
    ctx: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="The folder of the run; unset: the newest unfinished one in runs/.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Train up to the newest checkpoint again and compare; changes nothing."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --verify: replay at least the last N steps."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(metavar="K", help="Go on with so many processes, with the same rows a step."),
    ] = None,
    nnodes: Annotated[
        int | None, typer.Option(metavar="M", help="Go on with so many machines.")
    ] = None,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = "",
    max_restarts: MaxRestarts = 3,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped.

    It ends with the same bits as if it had not been stopped.

    For example:

      finegraft resume
      finegraft resume runs/first --verify
    """
    if steps is not None and not verify:
        raise ConfigError(
            "FG-RUN-008",
            "--steps without --verify",
            allowed="--steps together with --verify",
            fix=f"finegraft resume RUN --verify --steps {steps}; max_steps in config.yaml makes a "
            "run longer",
        )
    out: Output = ctx.obj
    run = run or _newest(out, finished_too=verify)
    settings = _settings_of(run)
    if verify:
        _require_one_process(settings)
        _verify(out, settings, steps)
        return
    if nproc is not None or nnodes is not None:
        from finegraft.training.distributed.portions import for_processes

        settings = for_processes(settings, nproc or settings.nproc, nnodes or settings.nnodes)
    done = _finished(run, settings)
    if done:
        out.note(f"{run} is finished, so there is nothing to go on with.")
    machines = launch.Machines(node_rank, rendezvous, max_restarts)
    finish(out, done or run_training(out, settings, resume=True, machines=machines))


def _require_one_process(settings: TrainConfig) -> None:
    """Raises ConfigError FG-DIST-010: a replay runs in this process alone."""
    if launch.wanted(settings):
        raise ConfigError(
            "FG-DIST-010",
            f"--verify of a run of {settings.nproc * settings.nnodes} processes",
            allowed="runs of one process: sums over several come out in another order",
            fix="finegraft resume RUN without --verify",
        )


def _newest(out: Output, *, finished_too: bool) -> Path:
    """The run in ``runs/`` in which something happened last; says which.

    Raises:
        ConfigError: FG-RUN-009, there is none.
    """
    found = sorted(RUNS.glob("*/config.yaml"), key=_last_touched, reverse=True)
    ended, busy = [], []
    for file in found:
        folder = file.parent
        if not finished_too and _is_finished(folder):
            ended.append(str(folder))
        elif alone.in_use(folder):
            busy.append(str(folder))
        else:
            out.note(f"{'verifying' if finished_too else 'going on with'} {folder}")
            return folder
    parts = [
        f"{words}: {', '.join(names[:6])}"
        for words, names in (("finished", ended), ("still at work", busy))
        if names
    ]
    raise ConfigError(
        "FG-RUN-009",
        f"no stopped run in {RUNS}/" + (f" ({'; '.join(parts)})" if parts else ""),
        allowed="a run that was stopped before its end",
        fix="name the folder: finegraft resume RUN"
        if found
        else "start one with: finegraft train --model demo --data ROWS.jsonl",
    )


def _last_touched(config: Path) -> float:
    events = config.parent / "events.jsonl"
    return max(path.stat().st_mtime for path in (config, events) if path.exists())


def _is_finished(folder: Path) -> bool:
    try:
        return _finished(folder, _settings_of(folder)) is not None
    except FinegraftError:  # told when somebody names it
        return True


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
    inside = next((p for p in folder.resolve().parents if (p / "config.yaml").is_file()), None)
    if inside is not None and folder.exists():
        fix = f"finegraft resume {shlex.quote(str(inside))}"
        raise ConfigError(
            "FG-RUN-001",
            f"{folder} is inside a run, and is none itself",
            allowed="the folder with config.yaml",
            fix=fix,
        )
    found = [path.parent for path in folder.parent.glob("*/config.yaml")]
    found = found or [path.parent for path in RUNS.glob("*/config.yaml")]
    names = sorted(str(path) for path in found)
    there = "it has no config.yaml" if folder.exists() else "there is no such folder"
    raise ConfigError(
        "FG-RUN-001",
        f"no run in {folder}: {there}",
        allowed=", ".join(names[:12]) or "a folder that `finegraft train` made",
        fix=f"finegraft resume RUN; {did_you_mean(str(folder), names)}"
        if names
        else "start one with: finegraft train --model demo --data ROWS.jsonl",
    )


def _finished(folder: Path, settings: TrainConfig) -> Any:
    """The result of a run that has come to its end, or None when steps are left.

    Steps are left as well when the length in config.yaml was raised since.
    """
    file = folder / "events.jsonl"
    events = read_events(file) if file.is_file() else []
    saved = next((p for p in (folder / "adapter", folder / "model") if p.is_dir()), None)
    last = {event["type"]: event for event in events}
    ending = [event["type"] for event in events if event["type"] in ("start", "end")]
    if not saved or ending[-1:] != ["end"]:
        return None
    end, start = last["end"], last["start"]
    if end["step"] < settings.max_steps:
        return None
    if settings.max_steps <= 0 and start["epochs"] < settings.num_train_epochs:
        return None
    return SimpleNamespace(
        run=folder,
        adapter=None if settings.trains_all else saved,
        steps=end["step"],
        total_steps=end["step"],
        loss=end["loss"],
        eval_loss=(last.get("eval") or {}).get("loss"),
        seconds=end["seconds"],
        tokens=end["tokens"],
        interrupted=False,
        task=settings.task,
        metrics=end.get("metrics"),
    )


def _verify(out: Output, settings: TrainConfig, steps: int | None) -> None:
    keep_freed_memory()
    with out.busy("starting"), quiet_libraries():
        from finegraft.training import replay
    with terminable(), quiet_libraries(), quiet_datasets(), progress(out.err) as listener:
        verdict = replay.verify(settings, steps=steps, listener=listener)
    values = {
        "run": str(verdict.run),
        "equal": verdict.equal,
        "from_step": verdict.from_step,
        "to_step": verdict.to_step,
        "compared": verdict.values,
        "differences": [vars(one) for one in verdict.differences],
        "seconds": verdict.seconds,
    }
    out.result(values, lambda to: _show(verdict, to))
    if not verdict.equal:
        raise typer.Exit(STATUS_DIFFERENT)


def _show(verdict: Any, to: Console) -> None:
    def line(words: str, style: str = "") -> None:
        to.print(words, style=style, markup=False, soft_wrap=True)

    start = f"checkpoint-{verdict.from_step}" if verdict.from_step else "the first step"
    count = verdict.to_step - verdict.from_step
    done = f"Replayed {count:,} step{'s' if count > 1 else ''} from {start} in "
    done += clock(verdict.seconds)
    if verdict.equal:
        line(
            f"{done}: equal to checkpoint-{verdict.to_step}, bit for bit "
            f"({verdict.values:,} tensors and values of weights, optimizer, schedule and random "
            "state).",
            "green",
        )
        return
    count = len(verdict.differences)
    line(
        f"{done}: {count:,} of {verdict.values:,} tensors and values differ from "
        f"checkpoint-{verdict.to_step}:",
        "red",
    )
    for one in verdict.differences[:_SHOWN]:
        line(f"  {one.part}: {one.name}: {one.found}")
    if count > _SHOWN:
        line(f"  and {count - _SHOWN:,} more (--json lists all)")


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(resume)
