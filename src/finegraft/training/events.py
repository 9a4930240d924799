"""What a run tells, one line of JSON per event.

What: ``events.jsonl`` is the only source of everything that shows progress; listeners get the same
dictionaries as they are written. Constraint: append-only, one ``write`` a line, so that a killed
run leaves at most one torn line, which readers skip.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from finegraft.core.journal import by_step, heal, read_events
from finegraft.core.memory import peak_bytes
from finegraft.core.paths import storage_error
from finegraft.training.distributed import sharding

__all__ = ["EventLog", "Listener", "RunCallback", "by_step", "memory_bytes", "read_events"]

# Time left is told from this many logged lines, so that a slow start is soon forgotten.
_RECENT_LINES = 12

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events to a file, if there is one yet, and passes them to a listener."""

    def __init__(self, listener: Listener | None = None):
        self.listener = listener
        self.path: Path | None = None
        self._early: list[dict[str, Any]] = []

    def open(self, path: Path) -> None:
        """Start writing to ``path``, first the events that came before it existed."""
        try:
            heal(path)
        except OSError as error:
            raise storage_error(error, path) from error
        self.path = path
        early, self._early = self._early, []
        for event in early:
            self._write(event)

    def emit(self, kind: str, **values: Any) -> None:
        """Record one event and pass it on."""
        event = {"type": kind, "time": round(time.time(), 3), **values}
        self._write(event)
        if self.listener is not None:
            self.listener(event)

    def _write(self, event: dict[str, Any]) -> None:
        if self.path is None:
            self._early.append(event)
            return
        try:
            with open(self.path, "a", encoding="utf-8") as out:
                out.write(json.dumps(event) + "\n")
        except OSError as error:
            raise storage_error(error, self.path) from error


class Silent(EventLog):
    """Records nothing: of several processes, the first one tells."""

    def open(self, path: Path) -> None:
        """Open no file."""

    def emit(self, kind: str, **values: Any) -> None:
        """Tell nobody."""


def memory_bytes() -> int:
    """Memory in use: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The most that was in use: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_bytes()


def _kept(trainer: Any) -> dict[str, int]:
    """Of split layers, the bytes that this process keeps."""
    if getattr(trainer, "sharding", "none") == "none":
        return {}
    return {"sharded_bytes": sharding.kept_bytes(trainer.model)}


class RunCallback(TrainerCallback):
    """Turns the trainer's callbacks into events, and a stop request into a saved stop.

    Attributes:
        stop: Set by a signal handler; the current step is finished, saved, and training ends.
    """

    def __init__(self, log: EventLog, trainer: Any):
        self.log = log
        self.trainer = trainer
        self.stop = False
        self.started, self.before = 0.0, 0.0
        self.last_tokens, self.last_time = 0, 0.0
        self.recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_LINES)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks; a resumed run goes on with its saved step, seconds and tokens."""
        now = self.last_time = time.monotonic()
        self.before = getattr(self.trainer, "seconds_before", 0.0)
        self.started = now - self.before
        self.last_tokens = self.trainer.tokens_seen
        self.recent.append((state.global_step, now))
        parameters = list(self.trainer.model.parameters())
        self.log.emit(
            "start",
            step=state.global_step,
            total_steps=state.max_steps,
            seconds=round(self.before, 2),
            epochs=state.num_train_epochs,
            batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            processes=args.world_size,
            **_kept(self.trainer),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            parameters=sum(p.numel() for p in parameters),
            device="cpu" if args.device.type == "cpu" else str(args.device),
            dtype=str(self.trainer.model.dtype).removeprefix("torch."),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop here when asked to; of several processes, all after the same step."""
        if args.world_size > 1:
            self.trainer.stop_wanted = self.stop
            self.stop = bool(self.trainer.stop_agreed)
        if self.stop:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A stop in the middle of an epoch does not wait for an evaluation."""
        if self.stop and state.global_step < state.max_steps and state.epoch % 1:
            control.should_evaluate = False

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """One ``step`` event per logged training line."""
        if not logs or "loss" not in logs:
            return
        now, tokens = time.monotonic(), self.trainer.tokens_seen
        step, then = self.recent[0]
        self.recent.append((state.global_step, now))
        pace = (now - then) / max(state.global_step - step, 1)  # seconds a step, lately
        speed = (tokens - self.last_tokens) / max(now - self.last_time, 1e-9)
        self.last_tokens, self.last_time = tokens, now
        left = state.max_steps - state.global_step
        self.log.emit(
            "step",
            step=state.global_step,
            total_steps=state.max_steps,
            loss=logs["loss"],
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(speed, 1),
            memory_bytes=memory_bytes(),
            seconds=round(now - self.started, 2),
            eta_seconds=round(pace * left, 1),
            next_save_step=min(
                state.max_steps, (state.global_step // args.save_steps + 1) * int(args.save_steps)
            ),
        )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """One ``eval`` event per evaluation."""
        if metrics and "eval_loss" in metrics:
            measured = getattr(self.trainer, "measured", None)
            more = {"metrics": measured} if measured else {}
            self.log.emit("eval", step=state.global_step, loss=metrics["eval_loss"], **more)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One ``save`` event per checkpoint."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.log.emit("save", step=state.global_step, path=str(path))
