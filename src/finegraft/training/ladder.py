"""A ladder: the same rows through several methods of tuning, side by side.

What: ``plan`` turns settings and names of methods into one configuration each, ``climb`` trains and
measures them one after another and recommends one. How: every rung is a run folder of its own, made
by a fresh process (``training.rung``), with the same rows, seed and steps; the untrained model is
the first rung. Constraint: a rung that fails never stops the others, its reason stands in the
table; what is done already is not done again. Trade-off: about 15 s a rung for a new process and a
new model, so that memory is measured honestly and a crash costs one rung.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finegraft import adapters
from finegraft.core.errors import ConfigError, FinegraftError, did_you_mean
from finegraft.core.paths import require_writable, write_whole
from finegraft.core.schema import TrainConfig, build, groups
from finegraft.data.sources import absolute
from finegraft.models.locate import locate
from finegraft.training import ladder_report, run
from finegraft.training.events import EventLog, Listener
from finegraft.training.ladder_choice import BASE, recommend
from finegraft.training.ladder_worker import Clock, work
from finegraft.training.rung import MEASURES
from finegraft.training.tasks import TASKS
from finegraft.training.tasks._contract import settings as method_arguments

# What a ladder has where nothing is said: 9 minutes for 500 rows of two sentences with six methods
# on a 135M model and two cores, 3 minutes for 500 texts on a 23M encoder.
DEFAULTS: dict[str, Any] = {
    "output": "ladders/ladder",
    "eval_fraction": 0.2,
    "save_steps": 1000,
    "save_total_limit": 1,
}
EPOCHS = {"causal": 2.0, "classification": 6.0}
STEPS = 200  # at most, however many rows there are
METHODS = {
    "causal": ("lora", "dora", "bottleneck", "ia3", "prefix", "prompt"),
    "classification": ("lora", "bottleneck", "bitfit", "ia3", "prefix", "head"),
}
# Keys that say which method it is, which a ladder varies.
_VARIED = ("method", "method_settings", "full_finetuning")
_PLACE = ("output", "overwrite")


@dataclass(frozen=True)
class Rung:
    """One method. ``refused`` says why it cannot be trained with these settings."""

    name: str
    config: TrainConfig
    refused: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """What a ladder will do; ``data`` describes the rows, as in a run's ``data.json``."""

    folder: Path
    rungs: tuple[Rung, ...]
    data: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        """The settings that all rungs share."""
        return self.rungs[0].config


def plan(
    values: Mapping[str, Any],
    methods: Sequence[str] | None = None,
    per_method: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Check everything that can be checked before anything is trained.

    Args:
        values: Keys of ``TrainConfig``, without the method's name; those of an adapter go to the
            methods that have them. Without ``learning_rate`` each method has its own.
        methods: Names of ``adapters.names()``; None: six that suit the task.
        per_method: Settings of single methods by name, keys of ``TrainConfig`` or of the method.

    Raises:
        ConfigError: FG-LADDER-001 a task without a ladder, FG-LADDER-002 a key that a ladder
            varies, FG-LADDER-003 no methods, one twice, or settings of another one, FG-LADDER-004
            no held-out rows, FG-LADDER-005 a model that carries an adapter, FG-LADDER-006 a ladder
            with other settings in the folder, FG-LADDER-007 a run in it that is no rung; those of
            the configuration.
        AdapterError: FG-ADAPT-010, an unknown method.
        DataError: rows that cannot be trained on.
    """
    values, per_method = anywhere(values), per_method or {}
    task = str(values.get("task", "causal"))
    _require_ladder(task, values)
    chosen = list(methods) if methods is not None else list(METHODS[task])
    _require_methods(chosen, per_method)
    shared = {**DEFAULTS, "num_train_epochs": EPOCHS[task], **values}
    if values.get("eval_data"):
        shared["eval_fraction"] = values.get("eval_fraction", 0.0)
    base = build(shared, "the ladder's settings")
    run.require_own_keys(base)
    _require_bare(base)
    data = TASKS.get(task).check(base, EventLog())
    if data.held_out is None:
        raise ConfigError(
            "FG-LADDER-004",
            "no rows are held out, and methods are compared by what they make of unseen rows",
            allowed="held-out rows",
            fix="--eval-fraction 0.2, or --eval-data FILE",
        )
    shared |= _length(values, base, data.record["counts"])
    base = build(shared, "the ladder's settings")
    rungs = (
        Rung(BASE, _in(base, BASE)),
        *(_rung(name, base, shared, per_method.get(name, {}), values) for name in chosen),
    )
    written = {
        **values,
        "methods": chosen,
        "per_method": {k: dict(v) for k, v in per_method.items()},
    }
    planned = Plan(Path(base.output), rungs, data.record, written)
    if not base.overwrite:
        _require_same(planned)
    return planned


def anywhere(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with whole paths, so that a ladder can be gone on with from any folder."""
    paths = {
        key: str(Path(value).absolute())
        for key in ("model",)
        if isinstance(value := values.get(key), str) and Path(value).exists()
    }
    rows = {key: absolute(values[key]) for key in ("data", "eval_data") if values.get(key)}
    return {**values, **paths, **rows}


def _require_ladder(task: str, values: Mapping[str, Any]) -> None:
    if task not in MEASURES:
        raise ConfigError(
            "FG-LADDER-001",
            f"a ladder for the task '{task}'",
            allowed=", ".join(MEASURES),
            fix=did_you_mean(task, MEASURES),
        )
    varied = [key for key in _VARIED if key in values]
    if varied:
        raise ConfigError(
            "FG-LADDER-002",
            f"{', '.join(varied)}: this is what a ladder varies",
            allowed="methods by name, and settings of single ones",
            fix="--methods lora,full --method-set lora.r=8",
        )


def _require_methods(chosen: Sequence[str], per_method: Mapping[str, Any]) -> None:
    for name in chosen:
        adapters.find(name)
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    strange = sorted(set(per_method) - set(chosen))
    if not chosen or twice or strange:
        raise ConfigError(
            "FG-LADDER-003",
            f"settings of {', '.join(strange)}, which is not among the methods"
            if strange
            else f"{', '.join(twice)} more than once"
            if twice
            else "no method is named",
            allowed=f"methods of this ladder: {', '.join(chosen)}"
            if strange
            else ", ".join(adapters.names()),
            fix=did_you_mean(strange[0], chosen) if strange else "--methods lora,ia3,prompt",
        )


def _require_bare(config: TrainConfig) -> None:
    located = locate(config.model, revision=config.revision)
    if located.kind == "adapter":
        raise ConfigError(
            "FG-LADDER-005",
            f"{config.model} carries an adapter already, which would be every rung's start",
            allowed="a model without an adapter",
            fix=f"--model {located.base}" if located.base else "pass its base model",
        )


def _length(
    values: Mapping[str, Any], config: TrainConfig, counts: Mapping[str, int]
) -> dict[str, int]:
    """At most ``STEPS`` steps, unless a length was asked for."""
    if "max_steps" in values or "num_train_epochs" in values:
        return {}
    rows = -(-counts["tokens"] // config.max_length) if config.packing else counts["rows"]
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {"max_steps": STEPS} if math.ceil(rows / batch) * config.num_train_epochs > STEPS else {}


def _in(config: TrainConfig, name: str) -> TrainConfig:
    return config.model_copy(update={"output": str(Path(config.output) / name)})


def _rung(
    name: str,
    base: TrainConfig,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Rung:
    """The configuration of one method; one that the settings rule out keeps its reason."""
    method, _ = adapters.find(name)
    foreign = {*groups()["adapter"]} - {*method.keys}
    values = {key: value for key, value in shared.items() if key not in foreign}
    if method.peft_type != "LORA":
        values.pop("loraplus_lr_ratio", None)
    if "learning_rate" not in given:
        values["learning_rate"] = method.learning_rates[base.task]
    fields = TrainConfig.model_fields
    values |= {key: value for key, value in own.items() if key in fields}
    further = {key: value for key, value in own.items() if key not in fields}
    try:
        config = build({**values, "method": name, "method_settings": further}, f"method '{name}'")
    except FinegraftError as error:
        if not error.code.startswith("FG-ADAPT"):
            raise
        return Rung(name, _in(base, name), error.as_dict())
    method_arguments(config)  # refuses keys that the method does not have
    return Rung(name, _in(config, name))


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    """Settings and result of a rung; its log lies beside them."""
    return folder / "rungs" / f"{name}.yaml", folder / "rungs" / f"{name}.json"


def _require_same(planned: Plan) -> None:
    """Prove that what is in the folder are rungs of this ladder."""
    for rung in planned.rungs:
        settings, result = _files(planned.folder, rung.name)
        run = planned.folder / rung.name
        if not settings.is_file():
            if (run / "config.yaml").is_file():
                raise ConfigError(
                    "FG-LADDER-007",
                    f"{run} holds a run that is no rung of a ladder",
                    allowed="a new folder, or the folder of a ladder",
                    fix="--output with another folder; --overwrite replaces it",
                )
            continue
        before = yaml.safe_load(settings.read_text(encoding="utf-8"))
        now = rung.config.model_dump(mode="json")
        known = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        if "quality" not in known and not (run / "data.json").is_file():
            continue  # nothing of it is left to go on with
        changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k) != v]
        if known.get("fingerprint", planned.data["fingerprint"]) != planned.data["fingerprint"]:
            changed.append("the rows")
        if changed := [words for words in changed if words.split()[0] not in _PLACE]:
            raise ConfigError(
                "FG-LADDER-006",
                f"{planned.folder} holds a ladder with other settings for {rung.name}: "
                f"{', '.join(changed)}",
                allowed="the same settings, so that rungs can be compared",
                fix="--output with another folder; --overwrite trains every rung again",
            )


def climb(planned: Plan, *, listener: Listener | None = None) -> dict[str, Any]:
    """Train and measure what is not done yet, and write ladder.json, ladder.png and report.md.

    Args:
        planned: From ``plan``.
        listener: Called with the events of every run, and one ``rung`` event before each; all carry
            ``method``, ``number``, ``of`` and ``ladder_seconds`` (left for the whole ladder).

    Returns:
        What ``ladder.json`` holds, see docs/ladder.md.

    Raises:
        KeyboardInterrupt: Stopped; the same call goes on.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    if planned.config.overwrite:
        _clear(planned)
    require_writable(planned.folder / "rungs")
    write_whole(planned.folder / "ladder.yaml", _rerunnable(planned))
    clock = Clock(len(planned.rungs))
    results = []
    for number, rung in enumerate(planned.rungs, 1):
        place = {"method": rung.name, "number": number, "of": len(planned.rungs)}
        result = _known(planned, rung)
        how = "failed" if rung.refused else "done already" if result else "starting"
        clock.begin(number)
        if listener:
            listener({"type": "rung", "how": how, "ladder_seconds": clock.left(), **place})
        if result is None:
            result = _climb_one(planned, rung, clock, listener, place)
            clock.end()
        results.append(row(rung, result))
        values = summary(planned, results)
        write_whole(planned.folder / "ladder.json", json.dumps(values, indent=2) + "\n")
    ladder_report.write(values, planned.folder)
    return values


def _clear(planned: Plan) -> None:
    """Remove what is there of every rung, so that an interrupted ladder goes on with new ones."""
    for rung in planned.rungs:
        shutil.rmtree(planned.folder / rung.name, ignore_errors=True)
        for file in _files(planned.folder, rung.name):
            file.unlink(missing_ok=True)


def _rerunnable(planned: Plan) -> str:
    """Settings from which the same command can be given again, from any folder."""
    values = {k: v for k, v in planned.settings.items() if k != "overwrite"}
    values["output"] = str(planned.folder.absolute())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _known(planned: Plan, rung: Rung) -> dict[str, Any] | None:
    """The result of a rung that is done or refused; failures are tried again."""
    if rung.refused:
        return {"error": rung.refused}
    _, file = _files(planned.folder, rung.name)
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if "quality" in found else None


def _climb_one(
    planned: Plan, rung: Rung, clock: Clock, listener: Listener | None, place: dict[str, Any]
) -> dict[str, Any]:
    settings, target = _files(planned.folder, rung.name)
    run = planned.folder / rung.name
    going_on = (run / "data.json").is_file()
    target.unlink(missing_ok=True)
    write_whole(settings, rung.config.model_copy(update={"overwrite": False}).to_yaml())

    def tell(event: dict[str, Any]) -> None:
        clock.hear(event)
        if listener:
            listener({**event, "ladder_seconds": clock.left(), **place})

    how = BASE if rung.name == BASE else "resume" if going_on else "new"
    return work(settings, target, how, run / "events.jsonl", tell)


def row(rung: Rung, result: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of ``rungs``."""
    keys = (
        "quality",
        "interval",
        "metrics",
        "rows",
        "trainable_parameters",
        "parameters",
        "steps",
        "seconds",
        "peak_memory_bytes",
        "adapter_bytes",
        "error",
    )
    config = rung.config
    rate = None if rung.name == BASE else config.learning_rate
    run = None if rung.name == BASE or result.get("error") else config.output
    values = {key: result.get(key) for key in keys}
    return {"method": rung.name, **values, "learning_rate": rate, "run": run}


def summary(planned: Plan, rungs: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``ladder.json`` holds."""
    config = planned.config
    measure, better = _measure(config.task, planned.data)
    held = planned.data.get("eval_counts") or {"rows": planned.data["counts"].get("held_out")}
    return {
        "ladder": str(planned.folder),
        "task": config.task,
        "model": config.model,
        "data": planned.data["path"],
        "rows": planned.data["counts"]["rows"],
        "held_out_rows": held["rows"],
        "measure": measure,
        "better": better,
        "rungs": [{k: v for k, v in one.items() if k != "rows"} for one in rungs],
        "recommendation": recommend(rungs, measure, better),
    }


def _measure(task: str, data: Mapping[str, Any]) -> tuple[str, str]:
    """What ``quality`` is, and whether ``lower`` or ``higher`` is better."""
    if task == "causal":
        return "loss", "lower"
    return ("mse", "lower") if data.get("problem_type") == "regression" else ("accuracy", "higher")
