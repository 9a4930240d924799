"""One run, from a configuration to a folder.

What: data is checked, the model loaded, trained, saved; everything of it lies in the run folder.
How: a thin sequence over ``training.tasks``, which know rows and models. Constraint: the folder
appears only when data and model are good, ``adapter/`` only when it is complete, one process at a
time works in it, and whatever ends that leaves checkpoints that ``resume`` goes on from. Trade-off:
the checks cost a second before every run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from finegraft import opening
from finegraft.core.alone import alone
from finegraft.core.errors import ConfigError
from finegraft.core.paths import require_writable, whole_folder, write_whole
from finegraft.core.schema import TrainConfig, foreign
from finegraft.data.sources import absolute
from finegraft.training import (
    checkpoint,
    manifest,
    plot,
    record,
    same,
    stepdown,
    stream_check,
    trackers,
)
from finegraft.training.distributed import sharding, world
from finegraft.training.events import EventLog, Listener, RunCallback, Silent, peak_memory_bytes
from finegraft.training.plan.forecast import forecast_event
from finegraft.training.report import before_after, page
from finegraft.training.stream import Stream
from finegraft.training.tasks import TASKS
from finegraft.training.tasks._contract import Checked, quantization, settings
from finegraft.training.watch import WatchCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What came out. Losses are nats a token, ``tokens`` are real (non-pad) trained-on tokens.

    ``seconds`` and ``tokens`` are those of the whole run, before and after a stop.

    ``metrics`` are those of the saved model on the held-out rows, for tasks that have some.
    """

    run: Path
    steps: int
    total_steps: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    tokens: int
    interrupted: bool
    adapter: Path | None
    model: Any
    tokenizer: Any
    task: str = "causal"
    metrics: dict[str, Any] | None = None


def train(
    config: TrainConfig,
    *,
    listener: Listener | None = None,
    resume: bool = False,
    notes: Sequence[str] = (),
) -> RunResult:
    """Run a configuration to its end, or to an interrupt.

    Of several processes each calls this; the first one alone writes, and tells its listener.

    Args:
        config: The whole configuration.
        listener: Called with every event that goes to ``events.jsonl``.
        resume: Go on from the newest checkpoint of the run folder.
        notes: Told first, as notices.

    Raises:
        FinegraftError: of the part that found the problem; nothing half-written is left.
    """
    require_own_keys(config)
    settings(config)  # a method that is not there is told before rows are read
    quantization(config)
    trackers.require(config.report_to)
    config = stream_check.resolved(config)
    world.require_as_configured(config)
    sharding.require_possible(config)
    run, main = Path(config.output), world.here().main
    log = EventLog(listener) if main else Silent()
    for words in notes:
        log.emit("notice", message=words)
    made = _prepared_folder(run, config, resume) if main else []
    resume = world.share(resume)
    with alone(run) if main else contextlib.nullcontext():
        with _removed_on_error(made):
            newest = world.share(_going_on(run, config, log) if resume and main else None)
            world.require_seen(newest)
            saved = manifest.read(newest) or {} if newest else {}
            log.emit("run", **record.about(config))
            data = _checked(config, log, resume)
            log.emit("phase", name="loading model")
            trainer = _built(config, data)
            base = opening.sample(trainer.model)
            log.emit("base", **base)
            same.require_same_base(saved.get("base", {}), base, config.model)
            trainer.record = same.record(config, data.record, base)
            rows = data.record.get("digests")
            world.require_alike({"settings": _alike(config), "rows": rows, "base weights": base})
            if not resume and main:
                _fill(run, config, data)
            log.open(run / "events.jsonl")
            world.wait()
        return _train(config, trainer, data.tokenizer, log, newest)


def _prepared_folder(run: Path, config: TrainConfig, resume: bool) -> list[Path]:
    """Prove that the run may be written where it is to be; return the folders that this makes."""
    if resume:
        _require_run(run)
    else:
        _require_free(run, config.overwrite)
    made = [path for path in (run, *run.parents) if not path.exists()]
    require_writable(run)
    return made


def _checked(config: TrainConfig, log: EventLog, resume: bool) -> Any:
    """Check the rows, and tell what they will take; of several processes, the first one tells."""
    main = world.here().main
    log.emit("phase", name="checking data")
    data = TASKS.get(config.task).check(config if main else _unchecked(config), log)
    same.note_files(config, data.record)
    record.add_digests(data.record, data)
    if resume and main:
        same.require_same_rows(Path(config.output), config, data.record, data)
    told = forecast_event(_of_all(config), data) if main else None
    if told is not None:
        log.emit("forecast", **told)
    return data


def _built(config: TrainConfig, data: Any) -> Any:
    """The trainer of a run, which tells its folder and nobody else."""
    trainer = TASKS.get(config.task).build(config, data)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trackers.place(trainer, Path(config.output))
    trainer.sharding = config.sharding
    return trainer


def _unchecked(config: TrainConfig) -> TrainConfig:
    """The same for a process whose rows another one looks at."""
    return config.model_copy(update={"data_check": False})


def _of_all(config: TrainConfig) -> TrainConfig:
    """What all processes do together, as one process would; for forecasts."""
    processes = config.nproc * config.nnodes
    micro = config.gradient_accumulation_steps * processes
    return config.model_copy(update={"gradient_accumulation_steps": micro})


def _alike(config: TrainConfig) -> dict[str, Any]:
    """What every machine must have been told; where files lie may differ."""
    places = {"output", "model", "data", "eval_data", "overwrite"}
    return config.model_dump(mode="json", exclude=places)


def require_own_keys(config: TrainConfig) -> None:
    """Raises ConfigError FG-CLASS-001 for keys of another task, which would be ignored."""
    keys = foreign(config)
    if keys:
        raise ConfigError(
            "FG-CLASS-001",
            f"{', '.join(keys)} with task '{config.task}', which would ignore it",
            allowed="keys of this task, see `finegraft train --help`",
            fix=f"remove {keys[0]}, or pass another --task",
        )


def _require_free(run: Path, overwrite: bool) -> None:
    """Raises ConfigError FG-RUN-002 when a run is there already."""
    if not (run / "config.yaml").exists():
        return
    if not overwrite:
        raise ConfigError(
            "FG-RUN-002",
            f"{run} already holds a run",
            allowed="a new folder",
            fix=f"`finegraft resume {run}` goes on with it; --output takes another folder; "
            "--overwrite replaces it",
        )


def _require_run(run: Path) -> None:
    """Raises ConfigError FG-RUN-001 when there is no run; one without a checkpoint starts anew."""
    if not (run / "data.json").is_file():
        raise ConfigError(
            "FG-RUN-001",
            f"{run} has no run to resume",
            allowed="a run folder that `finegraft train` made",
            fix="`finegraft train` starts a new run",
        )


def _going_on(run: Path, config: TrainConfig, log: EventLog) -> Path | None:
    """Find the checkpoint to go on from, None for the first step; tidy up after a kill.

    Raises:
        ConfigError: FG-RUN-005, settings that are not those of the checkpoint.
    """
    newest, damaged = checkpoint.newest(run / "checkpoints")
    notes = [f"{path.name} is damaged ({wrong}); it is removed" for path, wrong in damaged.items()]
    if newest is None:
        notes.append("there is no whole checkpoint yet, so the run starts with its first step")
    else:
        saved = manifest.read(newest) or {}
        step = checkpoint.step_of(newest)
        notes += same.require_same_config(saved.get("config", {}), config, step)
        notes += filter(None, [same.machine_changes(saved.get("machine", {}))])
    for words in notes:
        log.emit("notice", message=words)
    for path in damaged:
        checkpoint.remove(path)
    for folder in (run, run / "checkpoints", run / "report"):
        checkpoint.clean(folder)
    return newest


@contextlib.contextmanager
def _removed_on_error(made: list[Path]) -> Iterator[None]:
    """Remove a run folder that was made for the block, and its parents, if the block fails.

    Args:
        made: The folder, then its parents.
    """
    with contextlib.ExitStack() as undo:
        for path in reversed(made[1:]):  # `runs/`, if this was to be the first one
            undo.callback(_remove_empty, path)
        for path in made[:1]:
            undo.callback(shutil.rmtree, path, ignore_errors=True)
        yield
        undo.pop_all()


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):  # others may be in it
        path.rmdir()


def _fill(run: Path, config: TrainConfig, data: Checked) -> None:
    """Write what describes the run; an older run in the folder goes first.

    The configuration goes first and comes last: with it there is a run that can go on.
    """
    (run / "config.yaml").unlink(missing_ok=True)
    checkpoint.clean(run)
    for old in ("checkpoints", "adapter", "model", "report"):
        shutil.rmtree(run / old, ignore_errors=True)
    (run / "events.jsonl").unlink(missing_ok=True)
    write_whole(run / "data.json", json.dumps(data.record, indent=2) + "\n")
    write_whole(run / "config.yaml", anywhere(config).to_yaml())


def anywhere(config: TrainConfig) -> TrainConfig:
    """The configuration with whole paths, so that resuming works from any folder."""
    paths = {
        name: str(Path(value).absolute())
        for name in ("model",)
        if (value := getattr(config, name)) and Path(value).exists()
    }
    paths |= {
        name: absolute(value) for name in ("data", "eval_data") if (value := getattr(config, name))
    }
    return config.model_copy(update=paths)


@contextlib.contextmanager
def _stopping(callback: RunCallback, log: EventLog) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: finish the step, save, end. Second: stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked or callback.stop:
            raise KeyboardInterrupt
        asked.append(number)
        callback.stop = True
        log.emit("notice", message="finishing this step, then saving; Ctrl-C again stops at once")

    numbers = [signal.SIGINT]
    if not world.here().several:  # there SIGTERM ends those whose group has lost a member
        numbers.append(signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(
    config: TrainConfig, trainer: Any, tokenizer: Any, log: EventLog, newest: Path | None
) -> RunResult:
    run, place = Path(config.output), world.here()
    callback = RunCallback(log, trainer)
    trainer.add_callback(callback)
    trainer.add_callback(WatchCallback(log, trainer, config))
    log.emit("phase", name="training")
    started = time.monotonic()
    with (
        record.Endings(log, run) if place.main else contextlib.nullcontext(),
        _stopping(callback, log),
        checkpoint.full_disk_named(run),
    ):
        stepdown.train(trainer, newest, log.emit, _changing(config, trainer))
        if isinstance(trainer.train_dataset, Stream):
            log.emit("notice", message=trainer.train_dataset.summary())
        state = trainer.state
        interrupted = callback.stop and state.global_step < state.max_steps
        adapter, metrics = None, None
        if interrupted:
            path = run / "checkpoints" / f"{checkpoint.PREFIX}{state.global_step}"
            log.emit("interrupted", step=state.global_step, path=str(path))
        else:
            log.emit("phase", name="saving")
            adapter = _save(config, trainer, run)
            metrics = _measure(trainer, run)
        seconds = time.monotonic() - started
        if not interrupted and place.main:
            before_after.measure(config, trainer, tokenizer, log, seconds, lambda: callback.stop)
        if place.main:
            plot.loss_curve(run / "events.jsonl", run / "report" / "loss.png")
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    result = RunResult(
        run=run,
        steps=state.global_step,
        total_steps=state.max_steps,
        loss=losses[-1] if losses else None,
        eval_loss=(metrics or {}).get("loss", held_out[-1] if held_out else None),
        seconds=round(trainer.seconds_before + seconds, 2),
        tokens=trainer.tokens_seen,
        interrupted=interrupted,
        adapter=adapter,
        model=trainer.model,
        tokenizer=tokenizer,
        task=config.task,
        metrics=metrics,
    )
    if not interrupted:
        log.emit(
            "end",
            step=result.steps,
            loss=result.loss,
            seconds=result.seconds,
            tokens=result.tokens,
            peak_memory_bytes=peak_memory_bytes(),
            **({"metrics": metrics} if metrics else {}),
        )
    if place.main:
        page.write(run)
    return result


def _changing(config: TrainConfig, trainer: Any) -> Callable[..., None]:
    """What keeps settings that training itself had to change, for the next resume."""
    values: dict[str, Any] = {}

    def changed(**new: Any) -> None:
        values.update(new)
        now = anywhere(config.model_copy(update=values))
        write_whole(Path(config.output) / "config.yaml", now.to_yaml())
        trainer.record = {**trainer.record, "config": now.model_dump(mode="json")}

    return changed


def _measure(trainer: Any, run: Path) -> dict[str, Any] | None:
    """Measures of what was saved, kept in ``report/metrics.json``; None where a task has none."""
    measured = trainer.measure() if hasattr(trainer, "measure") else None
    if not measured or not world.here().main:
        return measured or None
    (run / "report").mkdir(exist_ok=True)
    write_whole(run / "report" / "metrics.json", json.dumps(measured, indent=2) + "\n")
    return measured


def _save(config: TrainConfig, trainer: Any, run: Path) -> Path:
    """Write ``adapter/`` (or ``model/`` after full fine-tuning), complete or not at all."""
    final = run / ("model" if config.trains_all else "adapter")
    if not world.here().main:
        trainer.save_model(str(final))  # writes nothing; split weights are put together by all
        return final
    with checkpoint.full_disk_named(final), whole_folder(final) as folder:
        trainer.save_model(str(folder))
    return final
