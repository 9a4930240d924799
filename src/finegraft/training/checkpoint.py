"""Checkpoints that are whole or not there.

What: a checkpoint is written beside its place and renamed when complete. How: while it is written
the trainer sees a staging folder as its output. Constraint: a crash, a full disk or a kill leaves
the older checkpoints as they were and never a folder that looks complete and is not.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from finegraft.core.errors import FinegraftError
from finegraft.core.paths import storage_error, whole_folder

PREFIX = "checkpoint-"
_STATE = "trainer_state.json"
_TORCH_WRITES = ("PytorchStreamWriter failed", "unexpected pos", "No space left")


def checkpoints(folder: Path) -> list[Path]:
    """Return complete checkpoints in ``folder``, oldest step first."""
    found = [
        path
        for path in Path(folder).glob(f"{PREFIX}*")
        if path.name[len(PREFIX) :].isdigit() and (path / _STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn what libraries say about a full disk into FG-DISK-001.

    safetensors and torch report a failed write as errors of their own, which name no errno.

    Raises:
        StorageError: FG-DISK-001, FG-DISK-002 or FG-DISK-003.
    """
    try:
        yield
    except FinegraftError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error
    except (SafetensorError, RuntimeError) as error:
        words = str(error)
        named = re.search(r"os error (\d+)", words)  # how Rust shows an errno
        if named:
            raise storage_error(OSError(int(named[1]), words), path) from error
        if any(sign in words for sign in _TORCH_WRITES):
            raise storage_error(OSError(errno.ENOSPC, words), path) from error
        raise


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a folder to write the checkpoint ``final`` into; see the module.

    The folder is called like ``final`` inside a staging folder, because the trainer builds that
    name itself.
    """
    with full_disk_named(final), whole_folder(final.parent / f"{final.name}.saving") as staging:
        yield staging
        inner = staging / final.name
        state = inner / _STATE
        if state.is_file():  # the best checkpoint's path must be the final one
            text = state.read_text(encoding="utf-8")
            state.write_text(text.replace(str(inner), str(final)), encoding="utf-8")
    saved = final.parent / f"{final.name}.saving"
    if final.exists():
        shutil.rmtree(final)
    (saved / final.name).rename(final)
    saved.rmdir()


class WholeCheckpoints(transformers.Trainer):
    """Mixed into trainers: a checkpoint is whole or not there, and the last step is the last."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Transformers takes one step too many when resumed in mid-epoch after the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        staging = getattr(self, "_staging", None)
        return str(staging) if staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"{PREFIX}{self.state.global_step}"
        with staged(final) as self._staging:
            try:
                # the stock method: trl's writes a model card that nobody asked for
                transformers.Trainer._save_checkpoint(self, model, trial)
                written = self._staging / final.name
            finally:
                self._staging = None
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
