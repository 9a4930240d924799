"""Watchdogs: what goes wrong in training, said while it happens, with the likely cause and cure.

What: six findings, ``FINDINGS``, each told once a run as a ``watch`` event. How: ``Watched`` keeps
the gradient norm that the trainer computes anyway; ``WatchCallback`` looks at it before every
optimizer step, so that a value that is not a number never reaches the weights, and at the logged
lines. Constraint: a step costs one number read from the device; no window is kept longer than
``_WINDOW`` lines. Trade-off: thresholds are wide, so that a normal run is never accused: what
diverges slowly shows in the held-out loss only.

Units: losses in nats a token, steps are optimizer steps, lines are logged steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import TrainerCallback

from finegraft.core.errors import TrainingError
from finegraft.core.schema import TrainConfig
from finegraft.models import swap
from finegraft.training.events import EventLog

_WINDOW = 5  # lines that are averaged: one odd batch is no trend
_ROSE_NATS, _ROSE_SHARE = 1.0, 0.4  # above the start
_LOST_NATS, _LOST_TIMES = 1.0, 3.0  # above the best
_FLAT_AT = (30, 100)  # lines after which the loss must have moved
_FLAT_SHARE = 0.002
_NOISY_SHARE = 0.1  # rows that differ so much say nothing in so few lines
_KNOWN_BY_HEART = 0.01  # nats; below this nothing is left to learn
_WORSE_SHARE, _WORSE_TIMES = 0.05, 2
_HIGH_RATE = 5e-3
_NOT_NUMBERS = ("FG-WATCH-001", "FG-WATCH-002")
# Beyond numbers and losses, high rates drive weights to where nothing has a slope any more.
_OF_HIGH_RATES = (*_NOT_NUMBERS, "FG-WATCH-003", "FG-WATCH-005")


@dataclass(frozen=True)
class Finding:
    """What a watchdog can say.

    Attributes:
        title: What it is.
        cause: The usual reasons.
        cure: What to do first.
    """

    title: str
    cause: str
    cure: str


FINDINGS = {
    "FG-WATCH-001": Finding(
        "the loss is not a number",
        "a learning rate that is too high, numbers beyond float16's 65,504, or base weights that "
        "are damaged",
        "--learning-rate 2e-4 --dtype auto; if the first step has it already, check the base model",
    ),
    "FG-WATCH-002": Finding(
        "the gradient is not a number",
        "a learning rate that is too high, or numbers beyond float16's 65,504 in backward",
        "--learning-rate 2e-4 --dtype auto --max-grad-norm 1",
    ),
    "FG-WATCH-003": Finding(
        "the loss rises far above where it was",
        "a learning rate that is too high for this method and batch",
        "a tenth of the learning rate, and --max-grad-norm 1",
    ),
    "FG-WATCH-004": Finding(
        "the loss does not move",
        "a learning rate that is too low, rows that the model knows already, or an adapter on "
        "modules that matter little",
        "ten times the learning rate; `finegraft data show` shows what is learnt of a row",
    ),
    "FG-WATCH-005": Finding(
        "the gradient is exactly zero",
        "what trains is not connected to the loss: it is disabled, or replaced after the optimizer "
        "was made",
        "train with another method or other target_modules, and look at print(model)",
    ),
    "FG-WATCH-006": Finding(
        "the held-out loss rises while training goes on",
        "the rows are learnt by heart: too many passes over too few rows",
        "fewer epochs, more rows, or a checkpoint from before",
    ),
}


class Watched(transformers.Trainer):
    """Mixed into trainers: keeps the gradient norm of the step for those who look.

    Attributes:
        last_grad_norm: Before clipping; None before the first step.
    """

    last_grad_norm: Any = None

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.last_grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.last_grad_norm


def _is_number(value: Any) -> bool:
    return value is None or math.isfinite(float(value))


def _chance(trainer: Any, config: TrainConfig) -> float:
    """The loss of a model that finds every token alike; infinite where that is no measure."""
    if config.task != "causal":
        return math.inf
    words = getattr(swap.core(trainer.model).config.get_text_config(), "vocab_size", None)
    return math.log(words) if words else math.inf


class WatchCallback(TrainerCallback):
    """Looks at every step and every logged line.

    Args:
        log: Where findings go, as ``watch`` events.
        trainer: Whose steps they are.
        config: Of the run, for the causes.

    Raises:
        TrainingError: FG-WATCH-001, FG-WATCH-002, unless ``stop_on_nan`` is off.
    """

    def __init__(self, log: EventLog, trainer: Any, config: TrainConfig):
        self.log = log
        self.trainer = trainer
        self.config = config
        self.told: set[str] = set()
        self.lines = 0
        self.first: list[float] = []  # of the first lines
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.best = math.inf  # median of a window
        self.held_out: list[float] = []
        self.zeros = 0
        self.chance = _chance(trainer, config)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop before a value that is not a number reaches the weights."""
        step = state.global_step + 1
        losses = getattr(self.trainer, "_tr_loss", None)  # summed since the last line
        if not _is_number(losses):
            self._broken("FG-WATCH-001", step)
        if not _is_number(getattr(self.trainer, "last_grad_norm", None)):
            self._broken("FG-WATCH-002", step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Look at one logged training line."""
        if not logs or "loss" not in logs:
            return
        loss, norm, step = logs["loss"], logs.get("grad_norm"), state.global_step
        if not math.isfinite(loss):
            self._broken("FG-WATCH-001", step)
            return
        self.lines += 1
        self.recent.append(loss)
        if self.lines <= _FLAT_AT[-1]:
            self.first.append(loss)
            if self.lines in _FLAT_AT:
                self._flat(step)
        self._risen(step)
        self.zeros = self.zeros + 1 if norm == 0 and loss > _KNOWN_BY_HEART else 0
        if self.zeros >= min(2, state.max_steps):
            self._tell("FG-WATCH-005", step, f"the gradient norm is exactly 0 at step {step}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Look at one held-out loss."""
        loss = (metrics or {}).get("eval_loss")
        if loss is None or not math.isfinite(loss):
            return
        self.held_out.append(loss)
        best = min(self.held_out)
        later = self.held_out[-_WORSE_TIMES:]
        if len(self.held_out) > _WORSE_TIMES and min(later) > best * (1 + _WORSE_SHARE):
            words = f"the held-out loss was {best:.3f} at best and is {loss:.3f} now"
            self._tell("FG-WATCH-006", state.global_step, words)

    def _risen(self, step: int) -> None:
        """FG-WATCH-003: medians of a few lines, against the first ones and the best."""
        if self.lines < 2 * _WINDOW:
            now = None if self.lines < _WINDOW else statistics.median(self.recent)
            self.best = min(self.best, now) if now is not None else self.best
            return
        now, start = statistics.median(self.recent), statistics.median(self.first[:_WINDOW])
        above_start = now > start + max(_ROSE_NATS, _ROSE_SHARE * start)
        above_best = now > _LOST_TIMES * self.best + _LOST_NATS
        above_chance = self.first[0] < self.chance + _ROSE_NATS / 2 < self.chance + _ROSE_NATS < now
        self.best = min(self.best, now)
        if above_start or above_best or above_chance:
            chance = f"; guessing gives {self.chance:.3g}" if above_chance else ""
            words = (
                f"the loss rose to {now:.3g} by step {step}; it began at {self.first[0]:.3g} and "
                f"was {min(self.best, *self.first):.3g} at best{chance}"
            )
            self._tell("FG-WATCH-003", step, words)

    def _flat(self, step: int) -> None:
        """FG-WATCH-004: the last third of the lines so far against the first, with their noise."""
        third = len(self.first) // 3
        early, late = self.first[:third], self.first[-third:]
        start, now = statistics.mean(early), statistics.mean(late)
        noise = math.sqrt((statistics.variance(early) + statistics.variance(late)) / third)
        silent = start <= _KNOWN_BY_HEART or noise > _NOISY_SHARE * start
        if not silent and abs(start - now) <= max(_FLAT_SHARE * start, noise):
            words = f"in {len(self.first)} lines the loss went from {start:.3f} to {now:.3f}"
            self._tell("FG-WATCH-004", step, words)

    def _broken(self, code: str, step: int) -> None:
        found = f"{FINDINGS[code].title} at step {step}"
        if not self.config.stop_on_nan:
            self._tell(code, step, found)
            return
        self._tell(code, step, found, severity="error")
        cause, cure = self._why(code)
        raise TrainingError(
            code,
            f"{found}; training stopped before it reached the weights. Likely: {cause}",
            allowed="finite numbers; --no-stop-on-nan goes on regardless",
            fix=cure,
        )

    def _tell(self, code: str, step: int, message: str, severity: str = "warning") -> None:
        if code in self.told:
            return
        self.told.add(code)
        cause, cure = self._why(code)
        self.log.emit(
            "watch",
            code=code,
            severity=severity,
            step=step,
            message=message,
            cause=cause,
            cure=cure,
        )

    def _why(self, code: str) -> tuple[str, str]:
        """Cause and cure; what the settings give away goes first."""
        known, config = FINDINGS[code], self.config
        if code in _OF_HIGH_RATES:
            if config.learning_rate > _HIGH_RATE:
                lower = max(2e-4, config.learning_rate / 100)
                return (
                    f"a learning rate of {config.learning_rate:g}; 2e-4 is usual",
                    f"--learning-rate {lower:.0e}",
                )
            if config.dtype == "float16" and code in _NOT_NUMBERS:
                return "float16, whose largest number is 65,504", "--dtype auto"
        if code == "FG-WATCH-004" and config.learning_rate < 1e-6:
            return f"a learning rate of {config.learning_rate:g}", "--learning-rate 2e-4"
        return known.cause, known.cure
