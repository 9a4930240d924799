"""When the memory ends in the middle of training: a smaller micro-batch, and on.

What: ``train`` runs a trainer to its end; where an allocation fails it halves the micro-batch and
doubles the accumulation, at one row recomputes all layers, and goes on from the last completed
step. How: at the start of each step the random states and running sums are kept; after a failure
they are put back, a checkpoint is written, and the trainer resumes from it, which is the path that
``finegraft resume`` takes. Constraint: the rows of a step stay the rows of that step, so no row is
skipped and none is used twice; gradients differ by rounding alone. A failure inside the optimizer,
which may have changed some weights, or between steps goes back to the newest whole checkpoint.
Trade-off: it can only answer an exception. Where the kernel ends the process instead there is none,
which is why the command line bounds its own memory (``core.process.bounded_memory``).

Shapes: b rows of a micro-batch.
"""

from __future__ import annotations

import functools
import gc
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.checkpoint import checkpoint as recompute
from transformers import TrainerCallback

from finegraft.core.errors import FinegraftError
from finegraft.core.memory import peak_bytes
from finegraft.models import swap
from finegraft.training import checkpoint, manifest

Tell = Callable[..., None]
# oneDNN and C++ say it in words of their own; accelerate knows those of CUDA and torch's allocator.
_WORDS = ("std::bad_alloc", "could not create a memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(word in str(error) for word in _WORDS)


@dataclass(frozen=True)
class _Random:
    """The states of every generator that training draws from."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @staticmethod
    def now() -> _Random:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return _Random(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class _Steps(TrainerCallback):
    """Remembers what the trainer was between two steps.

    Attributes:
        where: ``between`` steps, in a ``step``'s passes, or in the optimizer's ``update``.
        step: The last completed step.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.where, self.step = "between", -1
        self.random = _Random.now()
        self.sums: dict[str, Any] = {}

    def _keep(self, state: Any) -> None:
        self.step, self.random = state.global_step, _Random.now()
        trainer = self.trainer
        self.sums = {
            "tokens_seen": trainer.tokens_seen,
            "current_flos": trainer.current_flos,
            "_tr_loss": trainer._tr_loss.clone(),
            "_total_loss_scalar": trainer._total_loss_scalar,
        }

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The order of an epoch's rows is drawn after this; a resumed epoch draws it again."""
        self.where = "between"
        self._keep(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first pass of each step."""
        if self.step != state.global_step:
            self._keep(state)
        self.where = "step"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on weights may change."""
        self.where = "update"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step counts."""
        self.where = "between"

    def put_back(self) -> None:
        """Make the trainer what it was after the last completed step."""
        self.random.put_back()
        for name, value in self.sums.items():
            setattr(self.trainer, name, value)
        self.trainer.model.zero_grad(set_to_none=True)


def train(trainer: Any, source: Path | None, tell: Tell, changed: Callable[..., None]) -> None:
    """Run ``trainer`` to its end, stepping down where the memory ends.

    Args:
        trainer: One of finegraft's, with whole checkpoints, not yet trained.
        source: Checkpoint to go on from.
        tell: ``tell(kind, **values)`` records an event.
        changed: Called with the settings that are different from now on, before a checkpoint is
            written; it keeps them where a later resume looks.

    Raises:
        FinegraftError: FG-PLAN-010, the smallest step does not fit; FG-PLAN-011, the memory ended
            where no completed step can be gone back to.
    """
    begin = _Random.now()
    while True:
        steps = _Steps(trainer)
        trainer.add_callback(steps)
        first = checkpoint.step_of(source) if source else 0
        try:
            trainer.train(resume_from_checkpoint=str(source) if source else None)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or trainer.args.world_size > 1:
                raise
            words = _release(error)
        finally:
            trainer.remove_callback(steps)
        values = _smaller(trainer, words)
        changed(**values)
        source = _way_back(trainer, steps, source, first, words)
        if source is None:
            steps.put_back()
            begin.put_back()
        _forget(trainer)
        step = checkpoint.step_of(source) if source else 0
        message = f"the memory ended in step {trainer.state.global_step + 1}: {_in_words(values)}"
        tell("step_down", step=step, reason=words, peak_memory_bytes=peak_bytes(), **values)
        tell("notice", message=f"{message}; going on after step {step}")


def _release(error: BaseException) -> str:
    """Let go of what the failed pass held; return what the error says, in one line."""
    words = (str(error) or type(error).__name__).strip().splitlines()[0]
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return words


def _way_back(
    trainer: Any, steps: _Steps, source: Path | None, first: int, words: str
) -> Path | None:
    """The checkpoint of the last completed step, written now where it is not on the disk.

    None: from the beginning.
    """
    folder = Path(trainer.args.output_dir)
    if steps.step <= first and steps.where != "update":
        return _renewed(trainer, source)  # nothing was done yet
    if steps.where == "step":
        steps.put_back()
        trainer._save_checkpoint(trainer.model, None)
        return folder / f"{checkpoint.PREFIX}{steps.step}"
    newest, _ = checkpoint.newest(folder)
    if newest is None:
        raise FinegraftError(
            "FG-PLAN-011",
            f"the memory ended {_PLACES[steps.where]}, before the first checkpoint ({words})",
            allowed="a run whose steps fit",
            fix="finegraft train --fit chooses settings that do, or halve "
            "--per-device-train-batch-size and double --gradient-accumulation-steps",
        )
    return _renewed(trainer, newest)


_PLACES = {"update": "while weights were being changed", "between": "between two steps"}


def _renewed(trainer: Any, source: Path | None) -> Path | None:
    """Tell a checkpoint of the changed settings, so that resuming from it later is no mismatch."""
    saved = manifest.read(source) if source else None
    if source and saved:
        manifest.write(source, {**saved, **trainer.record})
    return source


def _smaller(trainer: Any, words: str) -> dict[str, Any]:
    """Make the trainer's next steps smaller, and return what changed.

    Raises:
        FinegraftError: FG-PLAN-010.
    """
    args = trainer.args
    size = args.per_device_train_batch_size
    if size > 1:
        # the largest divisor up to the half, so that the rows of a step stay the same rows
        smaller = next(d for d in range(size // 2, 0, -1) if size % d == 0)
        values = {
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * (size // smaller),
        }
        _resize(trainer, **values)
        return values
    if not _recomputes(trainer.model) and recompute_all(trainer):
        return {"gradient_checkpointing": True}
    raise FinegraftError(
        "FG-PLAN-010",
        f"the memory ended with one row at a time and every layer recomputed ({words})",
        allowed="a step that fits the memory",
        fix="--load-in-4bit, a smaller --max-length, or a smaller --model; "
        "`finegraft plan` says what would fit",
    )


def _resize(
    trainer: Any, per_device_train_batch_size: int, gradient_accumulation_steps: int
) -> None:
    args = trainer.args
    args.per_device_train_batch_size = per_device_train_batch_size
    args.gradient_accumulation_steps = gradient_accumulation_steps
    args.per_device_eval_batch_size = min(
        args.per_device_eval_batch_size, max(1, args.per_device_eval_batch_size // 2)
    )
    trainer._train_batch_size = args.train_batch_size


def _recomputes(model: Any) -> bool:
    flags = [
        bool(m.gradient_checkpointing)
        for m in swap.core(model).modules()
        if hasattr(m, "_gradient_checkpointing_func")
    ]
    return bool(flags) and all(flags)


def recompute_all(trainer: Any) -> bool:
    """Recompute every layer in backward from now on; False where the model or method cannot."""
    method = getattr(trainer, "method", None)
    if getattr(method, "not_recomputed", None):
        return False
    core = swap.core(trainer.model)
    if not getattr(core, "supports_gradient_checkpointing", False):
        return False
    layers = getattr(swap.decoder(trainer.model), "layers", None)
    if layers is None:
        core.gradient_checkpointing_enable({"use_reentrant": False})
        return True
    for layer in layers:
        layer._gradient_checkpointing_func = functools.partial(recompute, use_reentrant=False)
        layer.gradient_checkpointing = True
    return True


def _forget(trainer: Any) -> None:
    """Drop what belongs to the training that failed; the checkpoint brings it back."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()


def _in_words(values: dict[str, Any]) -> str:
    if "gradient_checkpointing" in values:
        return "every layer is recomputed in backward from now on"
    return (
        f"{values['per_device_train_batch_size']} rows a micro-batch and "
        f"{values['gradient_accumulation_steps']} micro-batches a step from now on"
    )
