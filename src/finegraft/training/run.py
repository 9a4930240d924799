"""One run, from a configuration to a folder.

What: data is checked, the model loaded, trained, saved; everything of it lies in the run folder.
How: a thin sequence over ``data``, ``adapters`` and ``SFTTrainer``. Constraint: the folder appears
only when data and model are good, ``adapter/`` only when it is complete, and an interrupt leaves a
checkpoint that ``resume`` goes on from. Trade-off: the checks cost a second before every run.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, set_seed

from finegraft.adapters import directory, lora
from finegraft.core.errors import ConfigError, DataError
from finegraft.core.paths import require_writable, whole_folder, write_whole
from finegraft.core.schema import TrainConfig
from finegraft.data import rows as layouts
from finegraft.data.chat_templates import get_chat_template
from finegraft.data.prepare import Prepared, prepare
from finegraft.data.sources import fingerprint, read_rows
from finegraft.models.locate import Located, locate
from finegraft.training import checkpoint, plot
from finegraft.training.arguments import SFTConfig
from finegraft.training.dataset import Rendering, columns
from finegraft.training.events import EventLog, Listener, RunCallback
from finegraft.training.sft import SFTTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What came out. Losses are nats a token, ``tokens`` are real (non-pad) trained-on tokens."""

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


@dataclass(frozen=True)
class _Data:
    """Checked rows, rendered."""

    train: Prepared
    held_out: Prepared | None
    record: dict[str, Any]
    tokenizer: Any


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
    run = Path(config.output)
    log = EventLog(listener)
    if resume:
        _require_run(run)
    else:
        _require_free(run, config.overwrite)
    with _removed_on_error(run):
        require_writable(run)
        log.emit("phase", name="checking data")
        data = _check_data(config, log)
        if resume:
            _require_same_data(run, data.record)
        log.emit("phase", name="loading model")
        trainer = _build(config, data)
        if not resume:
            _fill(run, config, data)
        log.open(run / "events.jsonl")
    return _train(config, trainer, data.tokenizer, log, resume)


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


def _check_data(config: TrainConfig, log: EventLog) -> _Data:
    """Read, recognise and render the rows; the weights are not loaded for it."""
    rows = layouts.apply_map(read_rows(config.data), config.map)
    name, layout = layouts.detect(rows)
    conversations, tools = layouts.conversations(rows, layout), layouts.tools_of(rows)
    held_rows: list[Any] = []
    if config.eval_data:
        held_rows = layouts.apply_map(read_rows(config.eval_data), config.map)
        _, held_layout = layouts.detect(held_rows)
        held = layouts.conversations(held_rows, held_layout)
    elif config.eval_fraction:
        size = max(1, round(len(conversations) * config.eval_fraction))
        held, conversations = conversations[-size:], conversations[:-size]
        tools = tools and tools[:-size]
    else:
        held = []
    tokenizer = _open_tokenizer(config)
    settings = {"max_length": config.max_length, "completion_only": config.completion_only_loss}
    prepared = prepare(conversations, tokenizer, tools=tools, **settings)
    held_out = prepare(held, tokenizer, **settings) if held else None
    record = {
        "path": config.data,
        "fingerprint": fingerprint(config.data),
        "format": name,
        "counts": asdict(prepared.counts),
        "eval_counts": asdict(held_out.counts) if held_out else None,
        "warnings": prepared.warnings,
    }
    log.emit("data", format=name, warnings=prepared.warnings, **asdict(prepared.counts))
    return _Data(prepared, held_out, record, tokenizer)


def _open_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of the configured model, with the configured chat template."""
    located: Located = locate(config.model, revision=config.revision)
    tokenizer = directory.open_tokenizer(
        located, max_seq_length=config.max_length, trust_remote_code=config.trust_remote_code
    )
    if config.chat_template:
        tokenizer = get_chat_template(tokenizer, config.chat_template)
    return tokenizer


def _build(config: TrainConfig, data: _Data) -> SFTTrainer:
    opened = directory.open_model(
        config.model,
        revision=config.revision,
        max_seq_length=config.max_length,
        trainable=True,
        trust_remote_code=config.trust_remote_code,
        tokenizer=data.tokenizer,
        dtype=config.dtype,
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
    )
    model = opened.model
    set_seed(config.seed)
    if not config.full_finetuning and opened.located.kind != "adapter":
        model = lora.attach(
            model,
            r=config.r,
            target_modules=config.target_modules,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias=config.bias,
            use_rslora=config.use_rslora,
        )
    how = Rendering(data.tokenizer, config.max_length, packing=config.packing)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, has_eval=data.held_out is not None),
        train_dataset=_dataset(data.train, how),
        eval_dataset=_dataset(data.held_out, how) if data.held_out else None,
        processing_class=data.tokenizer,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _dataset(prepared: Any, how: Rendering) -> Dataset:
    return Dataset.from_dict(columns(prepared.input_ids, prepared.labels, how))


def _arguments(config: TrainConfig, has_eval: bool) -> SFTConfig:
    # The schema's keys carry the trainer's own names: the shared ones are handed over unchanged.
    done_here = {"packing", "completion_only_loss", "eval_steps"}
    same = set(TrainConfig.model_fields) & {f.name for f in fields(SFTConfig)} - done_here
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if has_eval:
        steps = {"eval_strategy": "steps", "eval_steps": config.eval_steps}
        evaluation = steps if config.eval_steps else {"eval_strategy": "epoch"}
    return SFTConfig(
        output_dir=str(Path(config.output) / "checkpoints"),
        disable_tqdm=True,
        save_strategy="steps",
        share_prefix=config.share_prefix,
        **{name: getattr(config, name) for name in same},
        **evaluation,
    )


def _fill(run: Path, config: TrainConfig, data: _Data) -> None:
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
    config: TrainConfig, trainer: SFTTrainer, tokenizer: Any, log: EventLog, resume: bool
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
        adapter = None
        if interrupted:
            path = run / "checkpoints" / f"{checkpoint.PREFIX}{state.global_step}"
            log.emit("interrupted", step=state.global_step, path=str(path))
        else:
            log.emit("phase", name="saving")
            adapter = _save(config, trainer, run)
        plot.loss_curve(run / "events.jsonl", run / "report" / "loss.png")
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    result = RunResult(
        run=run,
        steps=state.global_step,
        total_steps=state.max_steps,
        loss=losses[-1] if losses else None,
        eval_loss=held_out[-1] if held_out else None,
        seconds=round(time.monotonic() - started, 2),
        tokens=trainer.tokens_seen,
        interrupted=interrupted,
        adapter=adapter,
        model=trainer.model,
        tokenizer=tokenizer,
    )
    if not interrupted:
        log.emit(
            "end", step=result.steps, loss=result.loss, seconds=result.seconds, tokens=result.tokens
        )
    return result


def _save(config: TrainConfig, trainer: SFTTrainer, run: Path) -> Path:
    """Write ``adapter/`` (or ``model/`` after full fine-tuning), complete or not at all."""
    final = run / ("model" if config.full_finetuning else "adapter")
    with checkpoint.full_disk_named(final), whole_folder(final) as folder:
        trainer.save_model(str(folder))
    return final
