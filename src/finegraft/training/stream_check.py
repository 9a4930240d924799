"""Whether rows are streamed, and what is looked at before they are.

What: ``resolved`` decides for a configuration, ``check`` lays the files out, renders and audits a
sample, and collects the held-out rows. How: the sample is what training reads first, rows from all
over the corpus, so nothing of it is read in vain. Constraint: seconds and memory do not grow with
the corpus. Trade-off: what is wrong further on shows while training; how many rows there are is an
estimate, so the number of steps has to be said.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from finegraft.core.errors import ConfigError, DataError
from finegraft.core.hardware import facts
from finegraft.core.schema import TrainConfig
from finegraft.data import readers, sources, stream
from finegraft.data.prepare import Prepared
from finegraft.data.stream_files import File
from finegraft.data.stream_remote import is_url
from finegraft.training import data_check
from finegraft.training.dataset import Rendering
from finegraft.training.events import EventLog
from finegraft.training.stream import Renderer, Stream, Totals, require_few, takes_for_training

SHARE = 0.25  # of the memory; larger files are streamed
MOST_HELD_OUT = 1000  # rows
_HELD_OUT_WINDOWS = 16
_COMPRESSED = 4


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        sample: The first rows that will be trained on.
        held_out: Rows that will not.
        record: For ``data.json``.
        stream: All rows.
    """

    sample: Prepared
    held_out: Prepared | None
    record: dict[str, Any]
    stream: Stream


def wanted(config: TrainConfig) -> bool:
    """Whether the rows of a configuration are to be streamed.

    Raises:
        DataError: as ``sources.files``, where that has to be found out.
    """
    if config.streaming != "auto" or config.task != "causal":
        return config.streaming == "true"
    parts = sources.parts(config.data)
    if any(is_url(part.path) for part in parts):
        return True
    total = 0
    for path in (path for part in parts for path in sources.files(part)):
        if not isinstance(path, str):  # data sets of the hub are in a cache that is not in memory
            times = _COMPRESSED if readers.suffixes(path)[1] else 1
            total += times * File.of(path, 0).bytes
    return total > SHARE * facts().memory_bytes


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with ``streaming`` decided, so that a resumed run decides the same."""
    if config.streaming != "auto" or config.task != "causal":
        return config
    return config.model_copy(update={"streaming": "true" if wanted(config) else "false"})


def check(config: TrainConfig, tokenizer: Any, log: EventLog) -> Checked:
    """Look at a sample of the rows and make the stream.

    Raises:
        ConfigError: FG-STREAM-001, no number of steps.
        DataError: the codes of ``data.stream`` and ``data.prepare``; FG-STREAM-005, too many rows
            of the sample cannot be used; FG-STREAM-006, none of them is held out or left to train.
    """
    plan = stream.lay_out(config.data, config.map)
    how = Rendering(
        tokenizer, config.max_length, config.completion_only_loss, packing=config.packing
    )
    renderer = Renderer(plan, how)
    fraction = 0.0 if config.eval_data else config.eval_fraction
    takes = takes_for_training(fraction)
    empty: tuple[stream.Cursor, list[stream.Row]] = (stream.Cursor(), [])
    cursor, rows = next(stream.pieces(plan, config.seed, takes=takes), empty)
    sample, wrong = renderer.prepared(rows)
    _require_rows(config, sample, rows, wrong)
    first = renderer.of(cursor, sample, len(rows), wrong)
    estimate = _estimate(config, plan, rows, len(first.rows))
    _require_steps(config, plan, estimate)
    raw = [row.row for row in rows if row.row is not None]
    looked = data_check.look(config, len(raw), sample=raw)
    held_out = _held_out(config, renderer, fraction)
    counts = asdict(sample.counts)
    record = {
        "path": sources.describe(config.data),
        "fingerprint": sources.fingerprint_streamed(config.data),
        "format": ", ".join(dict.fromkeys(name for name, _ in renderer.formats)),
        "counts": counts,
        "eval_counts": asdict(held_out.counts) if held_out else None,
        "warnings": [],
        "audit": looked.record,
        "streamed": {
            "files": len(plan.files),
            "bytes": plan.bytes,
            "blocks": len(plan.slots),
            "rows_about": estimate,
            "sample_rows": len(rows),
            "left_out": wrong[:10],
        },
    }
    record["warnings"] = [
        *sample.warnings,
        *_told(config, plan, estimate, len(rows), held_out),
    ]
    log.emit("data", format=record["format"], warnings=record["warnings"] + looked.lines, **counts)

    def tell(message: str) -> None:
        log.emit("notice", message=message)

    made = Stream(renderer, config.seed, fraction, first, tell)
    return Checked(sample, held_out, record, made)


def _require_rows(
    config: TrainConfig, sample: Prepared, rows: list[stream.Row], wrong: list[str]
) -> None:
    require_few(Totals(read=len(rows), wrong=len(wrong)), wrong)
    if not sample.input_ids:
        raise DataError(
            "FG-STREAM-006",
            f"{sources.describe(config.data)}: of the first {len(rows)} rows none is left to learn "
            f"from within {config.max_length} tokens" + (f" ({wrong[0]})" if wrong else ""),
            allowed="rows with an answer that is reached within max_length",
            fix=f"--max-length {2 * config.max_length}, or finegraft data show "
            f"{sources.describe(config.data)}",
        )


def _estimate(config: TrainConfig, plan: stream.Plan, rows: list[stream.Row], made: int) -> int:
    """Rows (or packed sequences) of one pass, about, from bytes and a sample of rows."""
    known = [row.row for row in rows if row.row is not None]
    written = (json.dumps(row, default=str, ensure_ascii=False) for row in known)
    each = sum(len(text.encode("utf-8", "replace")) + 1 for text in written) / max(1, len(known))
    total = plan.bytes / max(1.0, each) * made / max(1, len(rows)) * (1 - config.eval_fraction)
    return max(made, round(total)) if made else 0


def _require_steps(config: TrainConfig, plan: stream.Plan, estimate: int) -> None:
    """Raises ConfigError FG-STREAM-001: how many rows there are is not counted."""
    if config.max_steps > 0:
        return
    each = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = math.ceil(estimate / each)
    raise ConfigError(
        "FG-STREAM-001",
        f"{sources.describe(config.data)} is streamed ({plan.bytes / 1e9:.2f} GB in "
        f"{len(plan.files)} files), so its rows are not counted, and max_steps is not set",
        allowed="a number of steps; num_train_epochs is for rows that are held in memory",
        fix=f"--max-steps {steps} is about one pass; --streaming false holds all rows in memory",
    )


def _held_out(config: TrainConfig, renderer: Renderer, fraction: float) -> Prepared | None:
    """At most ``MOST_HELD_OUT`` rows that are not trained on, rendered.

    Raises:
        DataError: FG-STREAM-006, none was found.
    """
    if config.eval_data:
        plan = stream.lay_out(config.eval_data, config.map)
        renderer, takes = Renderer(plan, renderer.how), None
    elif not fraction:
        return None
    else:
        plan = renderer.plan

        def takes(row: dict[str, Any]) -> bool:
            return stream.is_held_out(row, fraction)

    rows: list[stream.Row] = []
    windows: set[int] = set()
    for cursor, found in stream.pieces(plan, config.seed, takes=takes):
        windows.add(cursor.slot)
        if cursor.epoch or len(windows) > _HELD_OUT_WINDOWS or len(rows) >= MOST_HELD_OUT:
            break
        rows += [row for row in found if row.row is not None]
    prepared, _ = renderer.prepared(rows[:MOST_HELD_OUT])
    if not prepared.input_ids:
        raise DataError(
            "FG-STREAM-006",
            f"no row to evaluate with was found: eval_fraction is {fraction:g}, and rows are "
            "looked for at the beginning of the stream only",
            allowed="a larger share, or a file with eval_data",
            fix="--eval-fraction 0.01, or --eval-data held_out.jsonl",
        )
    return prepared


def _told(
    config: TrainConfig, plan: stream.Plan, estimate: int, seen: int, held_out: Prepared | None
) -> list[str]:
    """What a person should know."""
    each = config.per_device_train_batch_size * config.gradient_accumulation_steps
    passes = config.max_steps * each / max(1, estimate)
    words = [
        f"rows are streamed: {plan.bytes / 1e9:.2f} GB in {len(plan.files)} files; the first "
        f"{seen:,} rows of the shuffled order were checked, the counts are theirs; max_steps is "
        f"about {passes:.2g} passes"
    ]
    if held_out:
        words.append(
            f"{held_out.counts.rows:,} held-out rows are evaluated, {MOST_HELD_OUT:,} at most; the "
            "others of their share are not trained on either"
        )
    return words
