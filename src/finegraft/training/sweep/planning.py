"""What a sweep will do, and whether it may go on in its folder.

What: ``plan`` turns settings and what is varied into a list of configurations, or into a search.
How: every value is validated before anything is trained, and the rows are read once. Constraint:
what is in the folder is gone on with only if its settings are these; what differs is told as
old -> new. Trade-off: only the first combination's rows are read; a combination that spoils them is
found when its run begins, and stands in the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig, build
from finegraft.training import run
from finegraft.training.events import EventLog
from finegraft.training.ladder import anywhere
from finegraft.training.sweep import search, space
from finegraft.training.tasks import TASKS
from finegraft.training.tasks._contract import settings as method_arguments

DEFAULTS: dict[str, Any] = {"output": "sweeps/sweep"}
SEARCHES = ("grid", "optuna")
MOST_RUNS = 1000  # of a grid; more is a slip of the keyboard
_PLACE = ("output", "overwrite")
_SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
        folder: Of the sweep.
        values: What all runs share, keys of ``TrainConfig``.
        space: What is varied.
        trials: Of a search; None: a grid.
        data: The rows, as in a run's ``data.json``.
        held_out: Whether rows are held out, by whose loss runs are then ordered.
    """

    folder: Path
    values: Mapping[str, Any]
    space: tuple[space.Axis, ...]
    trials: int | None
    data: Mapping[str, Any]
    held_out: bool
    overwrite: bool = False
    seed: int = field(default=0)

    @property
    def count(self) -> int:
        """Runs in all."""
        return self.trials or len(space.grid(self.space))

    @property
    def measure(self) -> str:
        """Key of the result that runs are ordered by."""
        return "eval_loss" if self.held_out else "train_loss"

    def config(self, values: Mapping[str, Any], name: str) -> TrainConfig:
        """The configuration of one run."""
        own = {"output": str(self.folder / name), "overwrite": False}
        return build({**self.values, **values, **own}, f"the run {space.label(values)}")

    def files(self, name: str) -> tuple[Path, Path]:
        """Settings and result of a run; its log lies beside them."""
        return self.folder / "results" / f"{name}.yaml", self.folder / "results" / f"{name}.json"

    def rerunnable(self) -> str:
        """Settings with which the same command can be given again, from any folder."""
        values = {k: v for k, v in self.values.items() if k not in _PLACE}
        values["output"] = str(self.folder.absolute())
        values["sweep"] = {axis.key: axis.written() for axis in self.space}
        if self.trials:
            values |= {"search": "optuna", "trials": self.trials}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def plan(
    values: Mapping[str, Any],
    vary: Mapping[str, Any],
    *,
    searching: str = "grid",
    trials: int | None = None,
) -> Plan:
    """Check everything that can be checked before anything is trained.

    Args:
        values: Keys of ``TrainConfig`` that all runs share.
        vary: What is varied, see ``space.axes``; a key with one value is shared as well.
        searching: ``grid`` or ``optuna``.
        trials: Of a search; None: 20, or as many as there are combinations.

    Raises:
        ConfigError: FG-SWEEP-001 to FG-SWEEP-003 what is varied, FG-SWEEP-004 optuna is not
            installed, FG-SWEEP-005 nothing is varied or too much, FG-SWEEP-006 another sweep in
            the folder, FG-SWEEP-007 a run in it that is none of this sweep, FG-SWEEP-008 a search
            that does not exist or has no trials; those of the configuration.
        DataError: rows that cannot be trained on.
    """
    _require_search(searching, trials)
    axes = space.axes(vary)
    varied = [axis for axis in axes if axis.ends or len(axis.values) > 1]
    fixed = {axis.key: axis.values[0] for axis in axes if axis not in varied}
    shared = anywhere({**DEFAULTS, **values, **fixed})
    shared = {key: value for key, value in shared.items() if key not in {a.key for a in varied}}
    if searching == "grid":
        _require_sensible(len(space.grid(varied)) if varied else 0)
    elif not varied:
        _require_sensible(0)
    else:
        trials = min(trials or search.TRIALS, space.size(varied) or MOST_RUNS)
    configs = _configurations(shared, varied)
    _require_one_process(configs)
    data = TASKS.get(configs[0].task).check(configs[0], EventLog())
    planned = Plan(
        Path(configs[0].output),
        shared,
        tuple(varied),
        trials if searching == "optuna" else None,
        data.record,
        getattr(data, "held_out", None) is not None,
        configs[0].overwrite,
        configs[0].seed,
    )
    if not planned.overwrite:
        require_same(planned)
    return planned


def _require_search(searching: str, trials: int | None) -> None:
    if searching not in SEARCHES or (trials is not None and trials < 1):
        known = searching in SEARCHES
        raise ConfigError(
            "FG-SWEEP-008",
            f"--trials {trials}" if known else f"--search {searching}",
            allowed="1 trial or more" if known else ", ".join(SEARCHES),
            fix="--search optuna --trials 20",
        )
    if searching == "optuna":
        search.require_optuna()
    elif trials is not None:
        raise ConfigError(
            "FG-SWEEP-008",
            f"--trials {trials} without a search; a grid tries every combination",
            allowed="--trials together with --search optuna",
            fix=f"--search optuna --trials {trials}, or leave out --trials",
        )


def _require_sensible(count: int) -> None:
    if 1 < count <= MOST_RUNS:
        return
    raise ConfigError(
        "FG-SWEEP-005",
        f"a grid of {count:,} runs" if count else "nothing is varied",
        allowed=f"2 to {MOST_RUNS:,} combinations",
        fix="--search optuna --trials 20 tries some of them"
        if count
        else "--set with several values, for example --set r=8,16,32 --set learning_rate=1e-4,3e-4",
    )


def _configurations(shared: Mapping[str, Any], varied: Sequence[space.Axis]) -> list[TrainConfig]:
    """One for each value of each key, which proves that every value is a good one."""
    first = {axis.key: axis.tried()[0] for axis in varied}
    out = []
    for axis in varied:
        for value in axis.tried():
            config = build({**shared, **first, axis.key: value}, f"the sweep, {axis.key}={value}")
            run.require_own_keys(config)
            method_arguments(config)
            out.append(config)
    return out


def _require_one_process(configs: Sequence[TrainConfig]) -> None:
    several = next((c for c in configs if c.nproc * c.nnodes > 1), None)
    if several:
        raise ConfigError(
            "FG-SWEEP-013",
            f"nproc {several.nproc}, nnodes {several.nnodes} in a sweep",
            allowed="runs of one process each",
            fix="leave out nproc and nnodes, or train the combinations one by one",
        )


def require_same(planned: Plan) -> None:
    """Prove that what is in the folder belongs to this sweep.

    Raises:
        ConfigError: FG-SWEEP-006 or FG-SWEEP-007.
    """
    changed = _other_space(planned)
    for name in names(planned):
        settings, _ = planned.files(name)
        folder = planned.folder / name
        if not settings.is_file():
            if (folder / "config.yaml").is_file():
                raise ConfigError(
                    "FG-SWEEP-007",
                    f"{folder} holds a run that is none of a sweep",
                    allowed="a new folder, or the folder of a sweep",
                    fix="--output with another folder; --overwrite replaces it",
                )
            continue
        if not (folder / "data.json").is_file():
            continue  # nothing of it is left to go on with
        changed += _other_settings(planned, settings, folder)
        if changed:
            break
    if changed:
        more = len(changed) - _SHOWN_DIFFERENCES
        raise ConfigError(
            "FG-SWEEP-006",
            f"{planned.folder} holds a sweep with other settings: "
            + ", ".join(changed[:_SHOWN_DIFFERENCES])
            + (f" and {more} more" if more > 0 else ""),
            allowed="the same settings, so that runs can be compared",
            fix="put the old values back; --output takes another folder; --overwrite trains every "
            "run again",
        )


def names(planned: Plan) -> list[str]:
    """Folders of the runs, in the order in which they are trained."""
    if planned.trials:
        return [trial_name(number) for number in range(1, planned.trials + 1)]
    return [space.name(values) for values in space.grid(planned.space)]


def trial_name(number: int) -> str:
    """The folder of one trial of a search."""
    return f"trial-{number:03}"


def _other_space(planned: Plan) -> list[str]:
    """What a search varied and varies, where that differs; a grid may grow."""
    file = planned.folder / "sweep.yaml"
    if not planned.trials or not file.is_file():
        return []
    old = yaml.safe_load(file.read_text(encoding="utf-8")).get("sweep", {})
    new = {axis.key: axis.written() for axis in planned.space}
    keys = dict.fromkeys([*old, *new])
    return [
        f"{key} {old.get(key, 'not varied')} -> {new.get(key, 'not varied')}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _other_settings(planned: Plan, settings: Path, folder: Path) -> list[str]:
    before = yaml.safe_load(settings.read_text(encoding="utf-8"))
    varied = {axis.key: before.get(axis.key) for axis in planned.space}
    now = planned.config(varied, folder.name).model_dump(mode="json")
    changed = [
        f"{key} {_cut(before.get(key))} -> {_cut(value)}"
        for key, value in now.items()
        if before.get(key) != value and key not in _PLACE
    ]
    saved = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    same_rows = saved.get("fingerprint") == planned.data.get("fingerprint")
    if not same_rows and "data" not in varied:
        changed.append(f"the rows of {planned.data.get('path')}")
    return changed


def _cut(value: Any) -> str:
    text = re.sub(r"\s+", " ", json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 50 else text[:50] + "..."
