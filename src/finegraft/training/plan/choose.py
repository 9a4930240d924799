"""Settings that stay within the memory there is, the effective batch kept.

What: ``fitting`` tries micro-batch, recomputation and 4-bit weights in the order of what they cost,
and takes the first whose forecast fits. How: rows are read and the model is taken apart once; each
try is arithmetic. Constraint: rows a step stay as configured, so the result of training changes by
rounding alone, until 4-bit weights are needed, which is said. Trade-off: a forecast is not a
measurement; what it leaves free (a tenth) is for that, and training steps down by itself where it
was wrong.

Shapes: b rows of a micro-batch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finegraft import adapters
from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig
from finegraft.training.plan.forecast import Forecast, Study, study

_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        config: The configuration with the chosen settings.
        changed: Setting -> value, where it is not as configured.
        before: Forecast of the configuration as it was.
        after: Forecast of what was chosen.
        why: One line for each change.
    """

    config: TrainConfig
    changed: dict[str, Any]
    before: Forecast
    after: Forecast
    why: tuple[str, ...]

    def as_flags(self) -> str:
        """The changes as flags of ``finegraft train``."""
        return flags(self.changed)


def flags(changed: dict[str, Any]) -> str:
    """Settings as flags."""
    words = []
    for name, value in changed.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            words.append(f"--{dashed} {shlex.quote(str(value))}")
    return " ".join(words)


def fitting(config: TrainConfig, studied: Study | None = None) -> Choice:
    """Choose settings for ``config`` that fit.

    Args:
        studied: Of the same configuration, where it was made already.

    Raises:
        ConfigError: FG-PLAN-001, nothing fits; and what ``study`` raises.
    """
    studied = studied or study(config)
    before = studied.of(config)
    least: tuple[Forecast, dict[str, Any]] | None = None
    for changed in _variants(config):
        tried = config.model_copy(update=changed)
        after = studied.of(tried) if changed else before
        if after.fits:
            return Choice(tried, changed, before, after, tuple(_why(config, changed, before)))
        if least is None or after.peak_memory_bytes < least[0].peak_memory_bytes:
            least = after, changed
    assert least is not None  # the first variant is the configuration itself
    forecast, changed = least
    raise ConfigError(
        "FG-PLAN-001",
        f"nothing fits {in_bytes(forecast.available_bytes)}: "
        f"{flags(changed) or 'the settings as they are'} would take "
        f"{in_bytes(forecast.peak_memory_bytes)}",
        allowed="a run that takes nine tenths of the memory there is, or less",
        fix=_ways_out(config, forecast),
    )


def _ways_out(config: TrainConfig, least: Forecast) -> str:
    ways = []
    if config.max_length > 128 and config.task == "causal":
        ways.append(f"--max-length {config.max_length // 2}")
    if config.trains_all:
        ways.append("an adapter instead of all weights (--method lora)")
    ways.append("a smaller --model")
    biggest = max(least.parts, key=lambda name: least.parts[name])
    return f"{', or '.join(ways)}; the most memory goes into {biggest}"


def _variants(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Changes to try, the cheapest first: as it is, smaller micro-batches, recomputing, 4 bits."""
    method = None if config.trains_all else adapters.find(config.method)[0]
    may_recompute = not getattr(method, "not_recomputed", None) and config.task == "causal"
    may_quantize = not (
        config.trains_all
        or config.load_in_4bit
        or config.load_in_8bit
        or getattr(method, "not_quantized", None)
    )
    recomputing = (False, True) if may_recompute and not config.gradient_checkpointing else (False,)
    for quantize in (False, True) if may_quantize else (False,):
        for again in recomputing:
            for size in _sizes(config.per_device_train_batch_size):
                changed: dict[str, Any] = {}
                if size != config.per_device_train_batch_size:
                    times = config.per_device_train_batch_size // size
                    changed["per_device_train_batch_size"] = size
                    changed["gradient_accumulation_steps"] = (
                        config.gradient_accumulation_steps * times
                    )
                if again:
                    changed["gradient_checkpointing"] = True
                if quantize:
                    changed["load_in_4bit"] = True
                yield changed


def _sizes(size: int) -> Iterator[int]:
    """``size`` and its divisors downward, so that a step keeps its rows."""
    while True:
        yield size
        if size == 1:
            return
        size = next(d for d in range(size // 2, 0, -1) if size % d == 0)


def _why(config: TrainConfig, changed: dict[str, Any], before: Forecast) -> Iterator[str]:
    if not changed:
        yield "fits as it is, so nothing was changed"
        return
    yield (
        f"as configured it would take {in_bytes(before.peak_memory_bytes)} of "
        f"{in_bytes(before.available_bytes)}"
    )
    if "per_device_train_batch_size" in changed:
        size, times = (
            changed["per_device_train_batch_size"],
            changed["gradient_accumulation_steps"],
        )
        yield (
            f"{size} rows a micro-batch instead of {config.per_device_train_batch_size}, {times} "
            f"micro-batches a step: the same {size * times} rows a step"
        )
    if "gradient_checkpointing" in changed:
        yield "layers are recomputed in backward: less memory, about a third more time"
    if "load_in_4bit" in changed:
        yield "the base is held in 4 bits: the smallest, and its rounding changes the result"


def in_bytes(count: float) -> str:
    """Bytes in units of a thousand."""
    for factor, unit in _SIZES:
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"
