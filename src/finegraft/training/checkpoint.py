"""Checkpoints that are whole or not there, and trainers that go on from them bit for bit.

What: ``WholeCheckpoints`` is mixed into trainers; ``newest`` finds the checkpoint to go on from.
How: a checkpoint is written in a hidden folder, listed in a manifest, brought to the disk and then
renamed. Beside what transformers saves (weights, optimizer, schedule, every random state, position
in the data) it holds the counters and sums that transformers forgets. Constraint: a crash, a full
disk, a kill or a power cut leaves the older checkpoints as they were. Trade-off: the last save of
an epoch waits for the evaluation that ends it, because that draws random numbers.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from finegraft.core.errors import FinegraftError
from finegraft.core.paths import leftovers, storage_error, sync, sync_names
from finegraft.training import manifest
from finegraft.training.distributed import world

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
_STATE = "trainer_state.json"
_SAVING = ".{}.partial"
_GOING = ".{}.old"
_TORCH_WRITES = ("PytorchStreamWriter failed", "unexpected pos", "iostream error", "No space left")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest step first; ``newest`` also proves them."""
    found = [
        path
        for path in Path(folder).glob(f"{PREFIX}*")
        if path.name[len(PREFIX) :].isdigit() and path.is_dir()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(path.name[len(PREFIX) :])


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        wrong = manifest.damage(path)
        if wrong is None:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def clean(folder: Path) -> None:
    """Remove what savers that were killed left in ``folder``."""
    for path in (*leftovers(folder), *folder.glob(f"{PREFIX}*.saving")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn what libraries say about a full disk into FG-DISK-001.

    safetensors, tokenizers and torch report a failed write as errors of their own, which name no
    errno.

    Raises:
        StorageError: FG-DISK-001, FG-DISK-002 or FG-DISK-003.
    """
    try:
        yield
    except FinegraftError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error
    except Exception as error:
        number = _errno_in(error)
        if number is None:
            raise
        raise storage_error(OSError(number, str(error)), path) from error


def _errno_in(error: Exception) -> int | None:
    words = str(error)
    if not isinstance(error, SafetensorError | RuntimeError) and type(error) is not Exception:
        return None  # tokenizers raises plain ``Exception``
    named = re.search(r"os error (\d+)", words)  # how Rust shows an errno
    if named:
        return int(named[1])
    return errno.ENOSPC if any(sign in words for sign in _TORCH_WRITES) else None


def _alone() -> None:
    """Wait for no other process."""


@contextmanager
def staged(
    final: Path,
    record: Callable[[], dict[str, Any]] = dict,
    *,
    main: bool = True,
    wait: Callable[[], None] = _alone,
) -> Iterator[Path]:
    """Yield a folder to write the checkpoint ``final`` into; see the module.

    What is written goes to a folder called like ``final`` inside it, because the trainer builds
    that name itself.

    Args:
        final: Where the checkpoint will be.
        record: Makes what the manifest keeps, called when all files are there.
        main: Whether this process makes the folders; of several, one does.
        wait: Returns when all processes have come here.
    """
    staging = final.parent / _SAVING.format(final.name)
    with full_disk_named(staging):
        try:
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            wait()
            yield staging
            wait()
            if main:
                _finish(staging / final.name, final, record())
            wait()
        finally:
            if main:
                shutil.rmtree(staging, ignore_errors=True)


def _finish(inner: Path, final: Path, record: dict[str, Any]) -> None:
    """Give a complete checkpoint its name."""
    state = inner / _STATE
    values = json.loads(state.read_text(encoding="utf-8"))
    if values.get("best_model_checkpoint") == str(inner):  # its path must be the final one
        values["best_model_checkpoint"] = str(final)
        state.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    manifest.write(inner, record)
    sync(inner)
    if final.exists():
        remove(final)
    inner.rename(final)
    sync_names(final.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that no half of it is ever taken for one."""
    going = path.parent / _GOING.format(path.name)
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: list[Path]) -> None:
    """Remove the oldest checkpoints beyond ``limit``.

    Args:
        folder: Of the checkpoints.
        limit: How many stay, the ones in ``keep`` counted only if they are new; None: all.
        keep: Never removed: the one just written, and the best.
    """
    if not limit or limit < 1:
        return
    # by time, because a folder may hold higher steps of an earlier training
    found = sorted(checkpoints(folder), key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
    kept = {path.name for path in keep}
    for path in found[:-limit]:
        if path.name not in kept:
            remove(path)


class WholeCheckpoints(transformers.Trainer):
    """Mixed into trainers: a checkpoint is whole or not there, and the last step is the last.

    Attributes:
        record: What the manifest of a checkpoint keeps of the run.
        seconds_before: Seconds of training before this process, up to the checkpoint.
    """

    record: dict[str, Any] = {}  # noqa: RUF012  replaced, never changed
    seconds_before = 0.0
    tokens_seen = 0
    _staging: Path | None = None
    _began = 0.0
    _sums: dict[str, Any] | None = None
    _held, _met = False, -1
    _told_loss = 0.0

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Also take back what transformers does not: counters, sums, the best checkpoint's place.

        Its place is found by the step: the run folder may have been moved since. When to save and
        log is as the arguments say, which may have changed since.
        """
        where = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)  # not those of the checkpoint
        self._began, self._sums, self._held, self._met = time.monotonic(), None, False, -1
        source = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        saved = (manifest.read(Path(source)) or {}) if source else {}
        self.seconds_before = saved.get("seconds", 0.0)
        if hasattr(self.train_dataset, "restore"):  # ``training.stream``
            self.train_dataset.restore(saved.get("stream"))
        if source:
            self.tokens_seen = saved.get("tokens", 0)
            self._sums = saved.get("sums")
            best = Path(self.args.output_dir) / f"{PREFIX}{self.state.best_global_step}"
            if self.state.best_global_step and best.is_dir():
                self.state.best_model_checkpoint = str(best)
        return where

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Transformers takes one step too many when resumed in mid-epoch after the last step."""
        if self._sums:  # of the losses since the last logged line
            self._tr_loss += self._sums["loss"]
            self._total_loss_scalar = self._sums["total"]
            self._globalstep_last_logged = self._sums["logged_at"]
            self._sums = None
        if self.state.global_step >= self.state.max_steps or self._stopped_early():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _stopped_early(self) -> bool:
        """Whether the checkpoint that this process goes on from was where training ended."""
        return any(
            isinstance(callback, transformers.EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )

    def _load_callback_state(self) -> None:
        """The patience that is left goes on, whatever the arguments say; nothing else does."""
        saved = self.state.stateful_callbacks.get("EarlyStoppingCallback")
        for callback in self.callback_handler.callbacks:
            if saved and isinstance(callback, transformers.EarlyStoppingCallback):
                values = saved[0] if isinstance(saved, list) else saved
                vars(callback).update(values["attributes"])
        super()._load_callback_state()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """A save at the last step of an epoch waits for what follows at the epoch's end.

        This is called after each step and once more when the epoch is over.
        """
        step, control = self.state.global_step, self.control
        after_step, self._met = self._met != step, step
        if not after_step:
            control.should_save = control.should_save or self._held
            self._held = False
        elif control.should_save and (control.should_training_stop or not self.state.epoch % 1):
            self._held, control.should_save = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"{PREFIX}{self.state.global_step}"
        main, wait = self.args.should_save, self.accelerator.wait_for_everyone
        self._told_loss = world.total([float(self._tr_loss)], self.args.device)[0]
        with staged(final, self._manifest, main=main, wait=wait) as self._staging:
            try:
                # the stock method: trl's writes a model card that nobody asked for
                transformers.Trainer._save_checkpoint(self, model, trial)
                written = self._staging / final.name
            finally:
                self._staging = None
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        best = self.state.best_model_checkpoint
        if main:
            rotate(run_dir, self.args.save_total_limit, [final, *([Path(best)] if best else [])])

    def _place_in_rows(self) -> dict[str, Any]:
        """Where a stream of rows goes on; a set of rows needs no more than the step."""
        if not hasattr(self.train_dataset, "state"):
            return {}
        args = self.args
        each = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {"stream": self.train_dataset.state(self.state.global_step * each)}

    def _manifest(self) -> dict[str, Any]:
        return {
            **self.record,
            **self._place_in_rows(),
            "step": self.state.global_step,
            "tokens": self.tokens_seen,
            "seconds": round(self.seconds_before + time.monotonic() - self._began, 3),
            "processes": self.args.world_size,
            "sums": {
                "loss": self._told_loss / self.args.world_size,
                "total": self._total_loss_scalar,
                "logged_at": self._globalstep_last_logged,
            },
        }
