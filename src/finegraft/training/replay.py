"""``finegraft resume --verify``: the newest checkpoint is made a second time and compared.

What: the steps between an older checkpoint and the newest one are trained again, and everything
that training goes on from is compared bit for bit. How: with the settings that the newest
checkpoint was made with, in a temporary folder, stopped at its step. Constraint: nothing in the run
changes; other rows or weights of the base are refused, not replayed. Trade-off: it takes as long as
those steps took, and room for one checkpoint where temporary files go (``TMPDIR``).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import safe_globals

from finegraft import opening
from finegraft.core.alone import alone
from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig
from finegraft.training import checkpoint, manifest, record, same
from finegraft.training.events import EventLog, Listener, RunCallback
from finegraft.training.tasks import TASKS

_PARTS = {  # files of a checkpoint by what they hold; weights are whatever safetensors there are
    "optimizer": "optimizer.pt",
    "schedule": "scheduler.pt",
    "random state": "rng_state*.pth",
    "scaler": "scaler.pt",
}
_COUNTERS = ("step", "tokens", "sums", "stream")


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both.

    Attributes:
        part: ``weights``, ``optimizer``, ``schedule``, ``random state``, ``scaler``, ``counters``.
        name: Of the tensor or value.
        found: The largest difference of a number, or what is different in words.
    """

    part: str
    name: str
    found: str


@dataclass(frozen=True)
class Verdict:
    """What a replay found. ``values`` is the number of tensors and numbers that were compared."""

    run: Path
    from_step: int
    to_step: int
    values: int
    differences: tuple[Difference, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether every bit is the same."""
        return not self.differences


def verify(
    config: TrainConfig, *, steps: int | None = None, listener: Listener | None = None
) -> Verdict:
    """Train up to the newest checkpoint of a run again, and compare.

    Args:
        config: Of the run.
        steps: At least so many steps are replayed; None: those since the checkpoint before, or all
            of them where there is only one.
        listener: Called with the events of the replay.

    Raises:
        ConfigError: FG-RUN-007, no whole checkpoint; FG-RUN-008, more steps than there are;
            FG-RUN-004, a process works in the folder.
        FinegraftError: as ``training.run.train`` for changed rows or another base.
    """
    run = Path(config.output)
    with _held(run):
        newest, start = _ends(run, steps)
        saved = manifest.read(newest) or {}
        log = EventLog(listener)
        words = same.machine_changes(saved.get("machine", {}))
        if words:
            log.emit("notice", message=words)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="finegraft-verify-") as folder:
            again, names = _replayed(_as_saved(config, saved), newest, start, Path(folder), log)
            log.emit("phase", name="comparing")
            values, differences = _compared(again, newest, names)
    return Verdict(
        run=run,
        from_step=checkpoint.step_of(start) if start else 0,
        to_step=checkpoint.step_of(newest),
        values=values,
        differences=tuple(differences),
        seconds=round(time.monotonic() - began, 2),
    )


def _as_saved(config: TrainConfig, saved: dict[str, Any]) -> TrainConfig:
    """The settings of a checkpoint, with the places of files as they are now."""
    known = {k: v for k, v in saved.get("config", {}).items() if k in TrainConfig.model_fields}
    places = ("output", "model", "data", "eval_data")
    return config.model_copy(update={k: v for k, v in known.items() if k not in places})


@contextlib.contextmanager
def _held(run: Path) -> Iterator[None]:
    """Hold the run, so that no checkpoint goes away; one that is read-only needs no holding."""
    if not os.access(run, os.W_OK):
        yield
        return
    with alone(run):
        yield


def _ends(run: Path, steps: int | None) -> tuple[Path, Path | None]:
    """The newest whole checkpoint, and the one to start from; None is the first step."""
    newest, damaged = checkpoint.newest(run / "checkpoints")
    if newest is None:
        told = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged.items())
        raise ConfigError(
            "FG-RUN-007",
            f"{run} has no whole checkpoint to verify" + (f" ({told})" if told else ""),
            allowed="a run that has saved at least once",
            fix=f"go on with it first: finegraft resume {run}",
        )
    last = checkpoint.step_of(newest)
    if steps is not None and not 1 <= steps <= last:
        raise ConfigError(
            "FG-RUN-008",
            f"--steps is {steps}, and the newest checkpoint is that of step {last}",
            allowed=f"1 to {last}",
            fix=f"--steps {last} replays the run from its first step",
        )
    before = [
        path
        for path in checkpoint.checkpoints(run / "checkpoints")
        if checkpoint.step_of(path) <= last - (steps or 1) and manifest.damage(path) is None
    ]
    return newest, before[-1] if before else None


def _replayed(
    config: TrainConfig, newest: Path, start: Path | None, folder: Path, log: EventLog
) -> tuple[Path, list[str]]:
    """Train from ``start`` to the step of ``newest``; the checkpoint, and names of what trains."""
    run = Path(config.output)
    changed = {"output": str(folder), "report_to": "none", "save_total_limit": 1}
    quiet = config.model_copy(update={**changed, "save_steps": 10**9})
    log.emit("phase", name="checking data")
    task = TASKS.get(config.task)
    data = task.check(quiet, log)
    same.note_files(quiet, data.record)
    record.add_digests(data.record, data)
    same.require_same_rows(run, quiet, data.record, data)
    log.emit("phase", name="loading model")
    trainer = task.build(quiet, data)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    saved = manifest.read(newest) or {}
    same.require_same_base(saved.get("base", {}), opening.sample(trainer.model), config.model)
    trainer.add_callback(_Until(log, trainer, checkpoint.step_of(newest)))
    log.emit("phase", name="training")
    with checkpoint.full_disk_named(folder):
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    return folder / "checkpoints" / newest.name, _trained(trainer)


class _Until(RunCallback):
    """Stops, saved, after a step, as Ctrl-C would."""

    def __init__(self, log: EventLog, trainer: Any, step: int):
        super().__init__(log, trainer)
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop = state.global_step >= self.step
        super().on_step_end(args, state, control, **kwargs)


def _trained(trainer: Any) -> list[str]:
    """Names of what the optimizer holds, in its order."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    held = (p for group in trainer.optimizer.param_groups for p in group["params"])
    return [names.get(id(p), "?") for p in held]


def _compared(one: Path, other: Path, names: list[str]) -> tuple[int, list[Difference]]:
    """Compare two checkpoints: how many values there are, and which differ."""
    found: list[Difference] = []
    count = 0
    for part, first, second in _pairs(one, other, names):
        count += len({*first, *second})
        for name in sorted({*first, *second}):
            words = _difference(first.get(name), second.get(name))
            if words:
                found.append(Difference(part, name, words))
    return count, found


def _pairs(
    one: Path, other: Path, names: list[str]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for file in sorted({p.name for folder in (one, other) for p in folder.glob("*.safetensors")}):
        yield "weights", _tensors(one / file), _tensors(other / file)
    for part, pattern in _PARTS.items():
        for file in sorted({p.name for folder in (one, other) for p in folder.glob(pattern)}):
            yield part, *(_flat(_loaded(folder / file), names) for folder in (one, other))
    kept = [manifest.read(folder) or {} for folder in (one, other)]
    yield "counters", *(_flat({k: values.get(k) for k in _COUNTERS}, []) for values in kept)


def _tensors(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with safe_open(str(file), "pt") as saved:
        return {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118


def _loaded(file: Path) -> Any:
    if not file.is_file():
        return {}
    with safe_globals():  # numpy's random state
        return torch.load(file, map_location="cpu", weights_only=True)


def _flat(value: Any, names: list[str], path: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary from path to value.

    The optimizer counts its tensors; ``names`` are those of the parameters, in that order.
    """
    if isinstance(value, dict):
        items = [(_named(key, path, names), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and not all(isinstance(v, int | float) for v in value):
        items = list(enumerate(value))
    else:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flat(item, names, f"{path}.{key}" if path else str(key)))
    return flat


def _named(key: Any, path: str, names: list[str]) -> Any:
    number = key if isinstance(key, int) else -1
    return names[number] if path == "state" and 0 <= number < len(names) else key


def _difference(one: Any, other: Any) -> str | None:
    """What is different, in words; None where all bits are the same."""
    if one is None or other is None:
        return None if one is other else "only in " + ("the run" if one is None else "the replay")
    if not isinstance(one, torch.Tensor):
        same_value = (
            repr(one) == repr(other)
            if not hasattr(one, "tobytes")
            else (one.tobytes() == other.tobytes())
        )
        return None if same_value else _cut(f"{other} in the run, {one} in the replay")
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{tuple(other.shape)} {other.dtype} and {tuple(one.shape)} {one.dtype}"
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    if torch.equal(*bits):
        return None
    if not one.is_floating_point():
        return f"{int((one != other).sum()):,} of {one.numel():,} numbers differ"
    apart = (one.double() - other.double()).abs()
    return (
        f"{int((apart > 0).sum()):,} of {one.numel():,} numbers differ, by up to {apart.max():.3g}"
    )


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
