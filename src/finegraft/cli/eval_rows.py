"""Which rows ``finegraft eval`` examines a model on: never any that it was trained on.

What: the rows that a run held out, or those of a file, without the ones that stand among the run's
training rows. How: the run's own task reads and splits the rows again, so they are the same ones;
the fingerprint in ``data.json`` proves that the file is. Constraint: where the rows come from, and
how many were left out, is always said. Trade-off: only whole equal rows (case and spacing aside)
count as trained on; a question that was asked in other words is not recognised.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError, DataError, near
from finegraft.core.schema import TrainConfig, from_file


@dataclass(frozen=True)
class Run:
    """A run folder and its settings."""

    folder: Path
    config: TrainConfig
    record: dict[str, Any]


@dataclass
class HeldOut:
    """Rows to examine a model on.

    Attributes:
        items: Conversations, or places of classified examples.
        tools: Of each conversation, where there are any.
        origin: Where the rows come from, in words.
        total: Rows before training rows were left out and the limit was applied.
        trained_on: How many were left out because they were trained on.
        notes: What else a reader has to know.
    """

    items: list[Any]
    tools: list[Any] | None
    origin: str
    total: int
    trained_on: int
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "origin": self.origin,
            "rows": len(self.items),
            "of": self.total,
            "trained_on_left_out": self.trained_on,
            "notes": self.notes,
        }


def find_run(name: str) -> Run | None:
    """The run in a folder; None where it is another kind of model.

    Raises:
        ConfigError: FG-EVAL-009, a run that is not finished.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file() or not (folder / "data.json").is_file():
        return None
    if not (folder / "adapter").is_dir() and not (folder / "model").is_dir():
        raise ConfigError(
            "FG-EVAL-009",
            f"the run {folder} is not finished: it holds neither adapter/ nor model/",
            allowed="a run that was trained to its end",
            fix=f"finegraft resume {folder}",
        )
    record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return Run(folder, from_file(str(folder / "config.yaml")), record)


def require_source(run: Run | None, name: str, data: str | None) -> None:
    """Prove that there are rows to examine the model on, before anything is read.

    Raises:
        ConfigError: FG-EVAL-001, a run without held-out rows; FG-EVAL-003, no run and no file.
    """
    if data is not None:
        return
    folder = Path(name).expanduser()
    if run is None and not folder.exists() and folder.absolute().parent.is_dir():
        close = near(folder.name, [p.name for p in folder.absolute().parent.iterdir()])
        if close:
            raise ConfigError(
                "FG-EVAL-003",
                f"there is no run {name}",
                allowed="a run of `finegraft train`, or another model with --data",
                fix=f"did you mean {folder.with_name(close)}?",
            )
    if run is None:
        raise ConfigError(
            "FG-EVAL-003",
            f"{name} is no run folder, so it has no held-out rows of its own",
            allowed="a run of `finegraft train`, or --data with rows that were not trained on",
            fix=f"finegraft eval {name} --data held.jsonl",
        )
    if not run.config.eval_data and not run.config.eval_fraction:
        raise ConfigError(
            "FG-EVAL-001",
            f"{run.folder} held out no rows (eval_fraction is 0, eval_data is unset)",
            allowed="rows that it was not trained on",
            fix=f"finegraft eval {run.folder} --data held.jsonl; or train again with "
            "--eval-fraction 0.1",
        )


def _require_same_file(run: Run) -> None:
    """Raises DataError FG-EVAL-002 when the run's file has changed: what it held out is unknown."""
    from finegraft.data.sources import describe, fingerprint

    if fingerprint(run.config.data) != run.record.get("fingerprint"):
        raise DataError(
            "FG-EVAL-002",
            f"{describe(run.config.data)} has changed since {run.folder} was trained, so the rows "
            "that it held out cannot be told from those that it was trained on",
            allowed="the file as it was, or another one with --data",
            fix=f"restore the file, or: finegraft eval {run.folder} --data held.jsonl",
        )


def _key(messages: Sequence[Any]) -> str:
    """A conversation without case, spacing and Unicode variants."""
    parts = [f"{m.get('role')}\0{m.get('content')}" for m in messages]
    return " ".join(unicodedata.normalize("NFKC", "\0".join(parts)).casefold().split())


def conversations(run: Run | None, data: str | None, mapping: dict[str, str]) -> HeldOut:
    """Held-out conversations of a run, or those of a file.

    Raises:
        DataError: FG-EVAL-002 and FG-EVAL-004; the codes of reading rows.
    """
    from finegraft.training.tasks import causal

    if data is None:
        assert run is not None  # require_source
        _require_same_file(run)
        _, train, held = causal.sides(run.config)
        origin = _origin_of(run, len(held))
        return _unseen(held.conversations, held.tools, train.conversations, origin)
    given = {"model": "demo", "data": data, "map": mapping or (run.config.map if run else {})}
    _, side, _ = causal.sides(TrainConfig(**given))
    if run is None:
        notes = ["what this model was trained on is not known here, so no row was left out"]
        return HeldOut(side.conversations, side.tools, data, len(side), 0, notes)
    try:
        _, train, _ = causal.sides(run.config)
    except DataError as error:
        notes = [f"the rows of the run cannot be read, so none was left out ({error.code})"]
        return HeldOut(side.conversations, side.tools, data, len(side), 0, notes)
    return _unseen(side.conversations, side.tools, train.conversations, data)


def _origin_of(run: Run, count: int) -> str:
    from finegraft.data.sources import describe

    config = run.config
    if config.eval_data:
        return f"{describe(config.eval_data)}, the run's eval_data"
    share = f"eval_fraction {config.eval_fraction:g}"
    return f"the {count:,} rows of {describe(config.data)} that the run held out ({share})"


def _unseen(
    items: list[Any], tools: list[Any] | None, trained: Sequence[Sequence[Any]], origin: str
) -> HeldOut:
    """Leave out what stands among the training rows.

    Raises:
        DataError: FG-EVAL-004, nothing is left.
    """
    known = {_key(messages) for messages in trained}
    kept = [i for i, messages in enumerate(items) if _key(messages) not in known]
    require_some(kept, len(items), origin)
    return HeldOut(
        [items[i] for i in kept],
        [tools[i] for i in kept] if tools else None,
        origin,
        len(items),
        len(items) - len(kept),
    )


def require_some(kept: Sequence[Any], total: int, origin: str) -> None:
    """Raises DataError FG-EVAL-004 when every row was trained on."""
    if not kept:
        raise DataError(
            "FG-EVAL-004",
            f"all {total:,} rows of {origin} stand among the training rows",
            allowed="rows that the model has not seen",
            fix="--data with other rows, or train again with --eval-fraction 0.1",
        )


def limited(held: HeldOut, limit: int) -> HeldOut:
    """At most ``limit`` rows, evenly spread over all of them; 0 takes all."""
    count = len(held.items)
    if not limit or count <= limit:
        return held
    places = [i * count // limit for i in range(limit)]
    held.notes.append(f"{limit:,} of {count:,} rows, evenly spread (--limit 0 takes all)")
    return HeldOut(
        [held.items[i] for i in places],
        [held.tools[i] for i in places] if held.tools else None,
        held.origin,
        held.total,
        held.trained_on,
        held.notes,
    )


def examples(run: Run, data: str | None) -> tuple[Any, HeldOut]:
    """A classifier's checked rows and which of its examples to examine it on.

    Returns:
        The task's checked data, whose ``sides[1]`` holds the examples, and places among them.

    Raises:
        DataError: FG-EVAL-002 and FG-EVAL-004; the codes of the task.
    """
    from finegraft.training.events import EventLog
    from finegraft.training.tasks import TASKS

    task = TASKS.get(run.config.task)
    if data is None:
        _require_same_file(run)
        checked = task.check(run.config, EventLog())
        count = len(checked.sides[1])
        return checked, HeldOut(list(range(count)), None, _origin_of(run, count), count, 0)
    own = task.check(run.config, EventLog())
    checked = task.check(run.config.model_copy(update={"eval_data": data}), EventLog())
    known = set(own.sides[0].keys())
    held = checked.sides[1]
    kept = [i for i, key in enumerate(held.keys()) if key not in known]
    require_some(kept, len(held), data)
    return checked, HeldOut(kept, None, data, len(held), len(held) - len(kept))
