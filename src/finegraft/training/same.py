"""What must be the same for a run to go on, and what may have changed.

What: rows, settings and base model of a resumed run are compared with those that its checkpoint
was made with; what differs is told as old -> new. How: the manifest of the checkpoint and
``data.json`` hold what there was. Constraint: a run goes on to the same bits or is refused; only
keys that change no number of training are free (``FREE``), and the length, which is told.
Trade-off: other versions of libraries are allowed with a warning, because a machine that was
updated is no reason to lose a run.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from finegraft.core.errors import ConfigError, DataError, ModelError
from finegraft.core.schema import TrainConfig, default_of
from finegraft.data.sources import describe, fingerprint, parts
from finegraft.training.record import MOST_HASHES, versions

# Keys that may be edited between a stop and a resume. Rows and base are compared by content.
FREE = (
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "report_rows",
    "stop_on_nan",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "sharding",
)
LENGTH = ("num_train_epochs", "max_steps")
# Free together while their product stays: as many rows a step, in other portions.
PORTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps", "nproc", "nnodes")
_BY_CONTENT = ("model", "data", "eval_data")
_OF_THIS_CALL = ("output", "overwrite")
_NO_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt")  # schedules that ignore it
_SHOWN = 6
_EXCERPT_CHARS = 50
_HASH_LETTERS = 8  # of each row in ``digests``
_SAME = 1e-2  # of numbers of a base that may be opened in another precision


def record(config: TrainConfig, data: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of each checkpoint keeps of the run.

    Args:
        config: Of the run.
        data: What ``data.json`` holds.
        base: Sample of the base's weights.
    """
    return {
        "config": config.model_dump(mode="json"),
        "data": {key: data.get(key) for key in ("fingerprint", "eval_fingerprint", "counts")},
        "base": base,
        "machine": machine(),
    }


def machine() -> dict[str, str]:
    """Versions, threads and device, which decide the last bits."""
    cuda = torch.cuda.is_available()
    return {
        **versions(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def machine_changes(saved: dict[str, str]) -> str | None:
    """What to warn of where versions, threads or device are not those of the checkpoint."""
    now = machine()
    changed = [
        f"{name} {saved.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if not saved or not changed:
        return None
    return (
        f"not what the checkpoint was made with: {', '.join(changed)}; the result may differ in "
        "the last bits"
    )


def config_changes(saved: dict[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Keys that are not as saved: name, old and new. A key that was not there yet had its default.

    Where rows and base lie may change; how parts of the rows are weighed and mapped may not.
    """
    now = config.model_dump(mode="json")
    changed = []
    for name in TrainConfig.model_fields:
        if name in _OF_THIS_CALL:
            continue
        new = now[name]
        old = saved.get(name, new if name in _BY_CONTENT else default_of(name, config.task))
        if name in ("data", "eval_data") and old and new:
            old, new = _weighing(old), _weighing(new)
        if old != new and name != "model":
            changed.append((name, old, new))
    return changed


def _weighing(spec: Any) -> list[tuple[float, dict[str, str]]]:
    return [(part.weight, dict(part.map)) for part in parts(spec)]


def require_same_config(saved: dict[str, Any], config: TrainConfig, step: int) -> list[str]:
    """Prove that the settings are those of the checkpoint, but for the free ones.

    Args:
        saved: Of the checkpoint's manifest.
        config: As it is now.
        step: Of the checkpoint.

    Returns:
        What to tell about the keys that were changed.

    Raises:
        ConfigError: FG-RUN-005.
    """
    changed = config_changes(saved, config)
    short = 0 < config.max_steps < step
    free = [*FREE, *LENGTH, *(PORTIONS if _as_many_rows(changed, config) else ())]
    if config.trains_all and config.sharding != "none":  # no process holds the optimizer to split
        free.remove("sharding")
    wrong = [c for c in changed if c[0] not in free or (c[0] == "max_steps" and short)]
    if wrong:
        told = ", ".join(f"{name}: {_shown(old)} -> {_shown(new)}" for name, old, new in wrong)
        back = " ".join(f"{name}: {_shown(old)}" for name, old, _ in wrong[:1])
        length = f"max_steps from {step}" if short else "the length"
        raise ConfigError(
            "FG-RUN-005",
            f"config.yaml is not that of checkpoint-{step}: {_cut(told)}",
            allowed=f"changes of {', '.join(FREE)} and {length}; other ones make another run",
            fix=f"put the old value back ({back}), or start a new run with --output",
        )
    return [_told(change, config) for change in changed]


def _as_many_rows(changed: list[tuple[str, Any, Any]], config: TrainConfig) -> bool:
    """Whether a step takes as many rows as before, in however many portions."""
    old = {name: was for name, was, _ in changed}
    now = {name: getattr(config, name) for name in PORTIONS}
    return math.prod(now.values()) == math.prod({**now, **old}[name] for name in PORTIONS)


def _told(change: tuple[str, Any, Any], config: TrainConfig) -> str:
    name, old, new = change
    words = f"{name} was changed: {_shown(old)} -> {_shown(new)}"
    if name in PORTIONS:
        words += "; as many rows a step, whose sums may differ in the last bits"
    if name in LENGTH and config.lr_scheduler_type not in _NO_LENGTH:
        words += (
            "; the learning rate follows the new length from here on, so the result is not that of "
            "a run that had this length from the start"
        )
    return words


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "..."


def _cut(text: str, characters: int = 300) -> str:
    return text if len(text) <= characters else text[:characters] + "..."


def note_files(config: TrainConfig, data: dict[str, Any]) -> None:
    """Put into what becomes ``data.json`` that which only this module looks at."""
    data["eval_fingerprint"] = fingerprint(config.eval_data) if config.eval_data else None


def require_same_rows(run: Path, config: TrainConfig, data: dict[str, Any], checked: Any) -> None:
    """Prove that the rows are those that the run was started with.

    Files may have been moved, or written anew with the same rows.

    Args:
        run: Its folder.
        config: Of the run.
        data: What ``data.json`` would hold now.
        checked: The rows as they are now.

    Raises:
        DataError: FG-RUN-003.
    """
    saved = json.loads((run / "data.json").read_text(encoding="utf-8"))
    files = {"train": config.data, "held_out": config.eval_data or config.data}
    found = [
        f"{describe(spec)}: {words}"
        for side, spec in files.items()
        if (words := _row_changes(saved, data, side, checked))
    ]
    if not found and not (_all_named(saved) and _all_named(data)):
        keys = ("fingerprint", "eval_fingerprint", "counts")
        changed = [k for k in keys if k in saved and saved[k] != data.get(k)]
        found = [f"{k} {_shown(saved[k])} -> {_shown(data.get(k))}" for k in changed]
        found = [f"{describe(config.data)}: {', '.join(found)}"] if found else []
    if found:
        raise DataError(
            "FG-RUN-003",
            f"the rows have changed since {run} was started: {_cut('; '.join(found))}",
            allowed="the same rows, so that the resumed run equals the uninterrupted one",
            fix="restore the file, or start a new run with --output and another folder",
        )


def _all_named(data: dict[str, Any]) -> bool:
    """Whether the digests cover every row, so that files need not be compared."""
    rows = data.get("counts", {}).get("rows", 0)
    return "train" in data.get("digests", {}) and rows <= MOST_HASHES


def _row_changes(
    saved: dict[str, Any], data: dict[str, Any], side: str, checked: Any
) -> str | None:
    """Which rows are others, as ``row 3: 1f2e3d4c -> 5b6a7988 'text'``; None where none is."""
    old, new = (one.get("digests", {}).get(side) for one in (saved, data))
    if not old and not new:
        return None
    if not old or not new:
        return "rows are held out now" if new else "no rows are held out any more"
    if old["order"] == new["order"]:
        return None
    before, now = (re.findall("." * _HASH_LETTERS, one["hashes"]) for one in (old, new))
    if sorted(before) == sorted(now) and before != now:
        return "the rows stand in another order"
    told = []
    for matched, i, j, k, m in difflib.SequenceMatcher(None, before, now, False).get_opcodes():
        if matched == "replace" and j - i == m - k:
            told += [
                f"row {i + n + 1}: {before[i + n]} -> {now[k + n]}{_text(checked, side, k + n)}"
                for n in range(j - i)
            ]
        elif matched != "equal":
            told.append(f"{_places(i, j)} -> {_places(k, m)}{_text(checked, side, k)}")
    if not told:
        return f"a row after the first {len(before):,}"
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return ", ".join(told[:_SHOWN]) + more


def _places(first: int, end: int) -> str:
    if end <= first:
        return "nothing"
    return f"row {first + 1}" if end == first + 1 else f"rows {first + 1} to {end}"


def _text(checked: Any, side: str, place: int) -> str:
    """The beginning of a row as it is now."""
    rows = getattr(checked, "held_out" if side == "held_out" else "train", None)
    ids = rows["input_ids"] if hasattr(rows, "column_names") else getattr(rows, "input_ids", [])
    if place >= len(ids):
        return ""
    words = checked.tokenizer.decode(ids[place], skip_special_tokens=True)
    return f" {_shown(' '.join(words.split()))}"


def require_same_base(saved: dict[str, Any], base: dict[str, Any], model: str) -> None:
    """Prove that the base that was opened is the one that the checkpoint belongs to.

    Args:
        saved: Sample of its embedding, from the checkpoint's manifest.
        base: The same of the model that was opened.
        model: Its name, for the message.

    Raises:
        ModelError: FG-RUN-006.
    """
    if saved == base or not saved:
        return
    same = [saved[k] == base[k] for k in ("rows", "columns")]
    if all(same) and torch.allclose(
        torch.tensor(saved["values"]), torch.tensor(base["values"]), rtol=_SAME, atol=1e-6
    ):
        return
    raise ModelError(
        "FG-RUN-006",
        f"{model} is not the base model that the run was started with: its embedding differs",
        allowed="the same weights, wherever they lie",
        fix="put the old model back, or set model in config.yaml to where it is now",
    )
