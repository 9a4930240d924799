"""One run, from a configuration to a folder.

What: data is checked, the model loaded, trained, saved; everything of it lies in the run folder.
How: a thin sequence over ``training.tasks``, which know rows and models. Constraint: the folder
appears only when data and model are good, ``adapter/`` only when it is complete, and an interrupt
leaves a checkpoint that ``resume`` goes on from. Trade-off: the checks cost a second before every
run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from finegraft.core.errors import ConfigError, DataError
from finegraft.core.paths import require_writable, whole_folder, write_whole
from finegraft.core.schema import TrainConfig, foreign
from finegraft.training import checkpoint, plot
from finegraft.training.events import EventLog, Listener, RunCallback
from finegraft.training.tasks import TASKS
from finegraft.training.tasks._contract import Checked, quantization, settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What came out. Losses are nats a token, ``tokens`` are real (non-pad) trained-on tokens.

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
    config: TrainConfig, *, listener: Listener | None = None, resume: bool = False
) -> RunResult:
    """Run a configuration to its end, or to an interrupt.

    Args:
        config: The whole configuration.
        listener: Called with every event that goes to ``events.jsonl``.
        resume: Go on from the newest checkpoint of the run folder.

    Raises:
        FinegraftError: of the part that found the problem; nothing half-written is left.
    """
    require_own_keys(config)
    settings(config)  # a method that is not there is told before rows are read
    quantization(config)
    run = Path(config.output)
    log = EventLog(listener)
    if resume:
        _require_run(run)
    else:
        _require_free(run, config.overwrite)
    with _removed_on_error(run):
        require_writable(run)
        log.emit("phase", name="checking data")
        task = TASKS.get(config.task)
        data = task.check(config, log)
        if resume:
            _require_same_data(run, data.record)
        log.emit("phase", name="loading model")
        trainer = task.build(config, data)
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        if not resume:
            _fill(run, config, data)
        log.open(run / "events.jsonl")
    return _train(config, trainer, data.tokenizer, log, resume)


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


def _require_same_data(run: Path, record: dict[str, Any]) -> None:
    """Raises DataError FG-RUN-003 when the rows are not those of the run."""
    saved = json.loads((run / "data.json").read_text(encoding="utf-8"))
    changed = [k for k in ("fingerprint", "counts") if saved.get(k) != record.get(k)]
    if changed:
        raise DataError(
            "FG-RUN-003",
            f"the rows of {record['path']} have changed since {run} was started",
            allowed="the same rows, so that the resumed run equals the uninterrupted one",
            fix="restore the file, or start a new run with --output and another folder",
        )


@contextlib.contextmanager
def _removed_on_error(run: Path) -> Iterator[None]:
    """Remove a run folder that the block made, and its parents, if the block fails."""
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made[:1]:
            shutil.rmtree(path, ignore_errors=True)
        for path in made[1:]:  # `runs/`, if this was to be the first one; others may be in it
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _fill(run: Path, config: TrainConfig, data: Checked) -> None:
    """Write what describes the run; an older run in the folder goes first."""
    for old in ("checkpoints", "adapter", "model", "report"):
        shutil.rmtree(run / old, ignore_errors=True)
    (run / "events.jsonl").unlink(missing_ok=True)
    write_whole(run / "config.yaml", _anywhere(config).to_yaml())
    write_whole(run / "data.json", json.dumps(data.record, indent=2) + "\n")


def _anywhere(config: TrainConfig) -> TrainConfig:
    """The configuration with whole paths, so that resuming works from any folder."""
    paths = {
        name: str(Path(value).absolute())
        for name in ("model", "data", "eval_data")
        if (value := getattr(config, name)) and Path(value).exists()
    }
    return config.model_copy(update=paths)


@contextlib.contextmanager
def _stopping(callback: RunCallback, log: EventLog) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: finish the step, save, end. Second: stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if callback.stop:
            raise KeyboardInterrupt
        callback.stop = True
        log.emit("notice", message="finishing this step, then saving; Ctrl-C again stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(
    config: TrainConfig, trainer: Any, tokenizer: Any, log: EventLog, resume: bool
) -> RunResult:
    run = Path(config.output)
    callback = RunCallback(log, trainer)
    trainer.add_callback(callback)
    saved = checkpoint.checkpoints(run / "checkpoints") if resume else []
    newest = saved[-1] if saved else None
    log.emit("phase", name="training")
    started = time.monotonic()
    with _stopping(callback, log), checkpoint.full_disk_named(run):
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
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
        plot.loss_curve(run / "events.jsonl", run / "report" / "loss.png")
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    result = RunResult(
        run=run,
        steps=state.global_step,
        total_steps=state.max_steps,
        loss=losses[-1] if losses else None,
        eval_loss=(metrics or {}).get("loss", held_out[-1] if held_out else None),
        seconds=round(time.monotonic() - started, 2),
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
            **({"metrics": metrics} if metrics else {}),
        )
    return result


def _measure(trainer: Any, run: Path) -> dict[str, Any] | None:
    """Measures of what was saved, kept in ``report/metrics.json``; None where a task has none."""
    measured = trainer.measure() if hasattr(trainer, "measure") else None
    if not measured:
        return None
    (run / "report").mkdir(exist_ok=True)
    write_whole(run / "report" / "metrics.json", json.dumps(measured, indent=2) + "\n")
    return measured


def _save(config: TrainConfig, trainer: Any, run: Path) -> Path:
    """Write ``adapter/`` (or ``model/`` after full fine-tuning), complete or not at all."""
    final = run / ("model" if config.trains_all else "adapter")
    with checkpoint.full_disk_named(final), whole_folder(final) as folder:
        trainer.save_model(str(folder))
    return final
