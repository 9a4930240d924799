"""One forecast: parts, sums, and whether they fit.

What: ``study`` reads the rows and takes the model apart, ``of_checked`` does so for rows that are
read already, as a run has them; ``Study.of`` sums up. How: ``anatomy`` and ``workload`` count,
``estimate`` turns counts into bytes and seconds. Constraint: the whole model's weights are never
loaded. Trade-off: a second or so, most of it for measuring the machine and two layers.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finegraft.core.errors import FinegraftError
from finegraft.core.hardware import facts
from finegraft.core.memory import available_bytes, resident_bytes
from finegraft.core.schema import TrainConfig
from finegraft.core.speed import gflops
from finegraft.models.load import resolve_dtype
from finegraft.training.events import EventLog
from finegraft.training.plan import estimate
from finegraft.training.plan.anatomy import LIBRARY_ERRORS, Anatomy, anatomy
from finegraft.training.plan.workload import Workload, drawn, rows_of, workload
from finegraft.training.tasks import TASKS
from finegraft.training.tasks._contract import quantization, settings

logger = logging.getLogger(__name__)

# A forecast within 15% of what is there is not called fitting.
MARGIN = 0.9
_MEASURE_SECONDS = 0.25


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        parts: Bytes at the peak, by what takes them.
        seconds_parts: Seconds from the first step to the saved result.
        disk_parts: Bytes in the run folder, and of an export.
        steps: Optimizer steps.
        tokens: That go through the layers in all of them.
        available_bytes: Memory that this process may have, with what it holds already.
        device: ``cpu`` or ``cuda``.
        probed: Corrected by real steps.
        counted: The model's layers were tried; False: usual figures stand for them.
    """

    parts: dict[str, int]
    seconds_parts: dict[str, float]
    disk_parts: dict[str, int]
    steps: int
    tokens: int
    available_bytes: int
    device: str
    probed: bool = False
    counted: bool = True

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that the run will hold at once."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """From the first step to the saved result."""
        return sum(self.seconds_parts.values())

    @property
    def disk_bytes(self) -> int:
        """Of the run folder and an export."""
        return sum(self.disk_parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak stays below nine tenths of the memory there is."""
        return self.peak_memory_bytes <= MARGIN * self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        """The keys that ``finegraft plan --json`` and the ``forecast`` event promise."""
        return {
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": round(self.seconds, 1),
            "disk_bytes": self.disk_bytes,
            "fits": self.fits,
            **asdict(self),
            "seconds_parts": {name: round(s, 2) for name, s in self.seconds_parts.items()},
        }


@dataclass(frozen=True)
class Study:
    """A configuration with its rows read and its model taken apart; ``of`` asks about variants.

    Attributes:
        resident: Bytes that this process held when the rows were read and nothing was loaded.
    """

    config: TrainConfig
    data: Any
    model: Anatomy
    resident: int

    def of(self, config: TrainConfig) -> Forecast:
        """The forecast of a variant with the same rows, method and precision of products."""
        model = self.model
        if (config.load_in_4bit, config.load_in_8bit) != (
            self.config.load_in_4bit,
            self.config.load_in_8bit,
        ):
            model = _anatomy(config, self.data)
        work = workload(config, self.data, flat=model.flat)
        return _sum_up(config, model, work, machine(config, self.resident))


def study(config: TrainConfig, log: EventLog | None = None) -> Study:
    """Read and check the rows of ``config``, and take its model apart.

    Raises:
        FinegraftError: what a run would say about the same settings, rows or model.
    """
    settings(config)
    quantization(config)
    data = TASKS.get(config.task).check(config, log or EventLog())
    return of_checked(config, data)


def of_checked(config: TrainConfig, data: Any) -> Study:
    """The same for rows that were checked already."""
    resident = resident_bytes()
    return Study(config, data, _anatomy(config, data), resident)


def forecast_event(config: TrainConfig, data: Any) -> dict[str, Any] | None:
    """What a run tells about itself before it loads its model; None for what cannot be counted."""
    try:
        return of_checked(config, data).of(config).as_dict()
    except FinegraftError:
        return None  # loading the model tells the same, as the error that it is
    except LIBRARY_ERRORS as error:
        logger.info("no forecast: %s", error)
        return None


def _anatomy(config: TrainConfig, data: Any) -> Anatomy:
    rows = rows_of(config, data.train, data.tokenizer)
    return anatomy(config, data, drawn(config, rows)[0])


def machine(config: TrainConfig, resident: int) -> estimate.Machine:
    """This machine, in the precision that ``config`` computes in."""
    device = facts().device
    dtype = resolve_dtype(config.dtype, device)
    if device == "cuda":
        return estimate.Machine(device, torch.cuda.mem_get_info()[0], 0, _rate(dtype, device))
    there = available_bytes() + resident_bytes()
    return estimate.Machine(device, there, resident, _rate(dtype, device))


@functools.cache
def _rate(dtype: torch.dtype, device: str) -> float:
    return 1e9 * gflops(dtype, device, _MEASURE_SECONDS)


def _sum_up(
    config: TrainConfig, model: Anatomy, work: Workload, here: estimate.Machine
) -> Forecast:
    c = estimate.CPU if here.device == "cpu" else estimate.GPU
    made = Forecast(
        parts=estimate.memory_parts(config, model, work, here, c),
        seconds_parts=estimate.seconds_parts(config, model, work, here, c),
        disk_parts=estimate.disk_parts(config, model, work),
        steps=work.steps,
        tokens=round(work.tokens),
        available_bytes=here.available,
        device=here.device,
        counted=model.measured,
    )
    return _as_recomputed(config, model, work, made)


def _as_recomputed(config: TrainConfig, model: Anatomy, work: Workload, made: Forecast) -> Forecast:
    """Training recomputes layers where their activations take more than their share of memory."""
    from finegraft.training.memory import SHARE

    if config.task != "causal" or config.gradient_checkpointing or not model.reaches_down:
        return made
    other = made.peak_memory_bytes - made.parts["activations"]
    room = int(SHARE * max(0, made.available_bytes - other))
    least = 2 * work.largest * model.hidden * model.itemsize * model.layers
    least += int(work.largest * model.kept_layer)
    kept = max(least, min(made.parts["activations"], room))
    share = (made.parts["activations"] - kept) / max(1, made.parts["activations"] - least)
    if share <= 0:
        return made
    seconds = {**made.seconds_parts}
    seconds["steps"] *= 1 + share / 2  # of recomputing every layer
    return replace(made, parts={**made.parts, "activations": kept}, seconds_parts=seconds)


def free_disk_bytes(config: TrainConfig) -> int:
    """Room where the run folder will be."""
    import shutil

    place = Path(config.output).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
