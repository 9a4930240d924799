"""The same rows before and after training, one by one.

What: the loss of held-out rows and of general texts, once as the tuned model says and once with
the adapter disabled. How: the trainer's own loss on one row at a time; rows and texts take turns,
in an order drawn once, so that stopping early leaves a fair choice of both. Constraint: unless a
number of rows was asked for, it ends with the chunk of rows in which a tenth of the training time
is over, and is left out for large models. Trade-off: batches of one row are slower than the
evaluation, and need no memory beyond training's.

Shapes: n rows. Units: nats a labelled token, seconds.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finegraft import adapters
from finegraft.core.errors import AdapterError
from finegraft.core.intervals import bootstrap_difference
from finegraft.core.schema import TrainConfig
from finegraft.training.collate import IGNORED
from finegraft.training.events import EventLog
from finegraft.training.report.texts import GENERAL

ROWS = 32  # when nothing was asked for
SHARE = 0.1  # of the training time
_LARGE_PARAMETERS = 3_000_000_000
_CHUNK = 4  # rows between two looks at the clock
_LEAST = 4  # rows that are worth showing
_SHOWN_LETTERS = 240
_CAUSAL = "causal"

Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What may be measured.

    Attributes:
        rows: At most.
        seconds: None: as long as it takes.
        refused: Why nothing is measured, or nothing.
    """

    rows: int
    seconds: float | None
    refused: str | None = None


def budget(config: TrainConfig, trainer: Any, training_seconds: float) -> Budget:
    """What a run's settings, model and length allow."""
    if config.sharding != "none":
        return Budget(0, None, "no process holds the whole model (sharding)")
    if config.report_rows == 0:
        return Budget(0, None, "report_rows is 0")
    if config.trains_all:
        return Budget(0, None, "every weight was trained, so the base is not in memory any more")
    if config.report_rows is not None:
        return Budget(config.report_rows, None)
    size = sum(p.numel() for p in trainer.model.parameters())
    if size > _LARGE_PARAMETERS:
        return Budget(
            0, None, f"the model has {size / 1e9:.1f}B parameters; report_rows asks for it"
        )
    return Budget(ROWS, SHARE * training_seconds)


def measure(
    config: TrainConfig,
    trainer: Any,
    tokenizer: Any,
    log: EventLog,
    training_seconds: float,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Measure and tell it as one ``before_after`` event.

    Args:
        config: Of the run.
        trainer: After training; its held-out rows are used.
        tokenizer: Shows rows as text.
        log: Where phase and result go.
        training_seconds: How long training took.
        stopped: Asked between rows; true ends it early.
    """
    allowed = budget(config, trainer, training_seconds)
    if allowed.refused:
        log.emit("before_after", rows=[], texts=[], skipped=allowed.refused)
        return
    log.emit("phase", name="comparing before and after")
    began = time.monotonic()

    def over() -> bool:
        late = allowed.seconds is not None and time.monotonic() - began > allowed.seconds
        return late or stopped()

    held_out = _rows(trainer.eval_dataset)
    causal = config.task == _CAUSAL
    chosen = {"rows": _drawn(len(held_out), allowed.rows)}
    material = {"rows": held_out}
    if causal:
        material["texts"] = [_text_row(text, tokenizer) for text in GENERAL]
        chosen["texts"] = _drawn(len(GENERAL), len(GENERAL))
    try:
        found = _pairs(trainer, material, chosen, over)
    except AdapterError as error:
        log.emit("before_after", rows=[], texts=[], skipped=error.found)
        return
    show = _Show(tokenizer, trainer.model, causal)
    rows = [{**show.row(held_out[i]), "row": i + 1, **pair} for i, pair in found["rows"]]
    texts = [{"text": GENERAL[i], **pair} for i, pair in found.get("texts", [])]
    log.emit(
        "before_after",
        rows=rows,
        texts=texts,
        of=len(held_out),
        held_out=_together(rows),
        general=_together(texts),
        seconds=round(time.monotonic() - began, 2),
        skipped=_too_few(len(rows), len(held_out), allowed),
    )


def _too_few(measured: int, there: int, allowed: Budget) -> str | None:
    if not there:
        return "no rows are held out; --eval-fraction 0.1 holds some out"
    if measured < min(_LEAST, there):
        return (
            f"{measured} rows fit into {allowed.seconds:.1f} s, a tenth of the training time; "
            "report_rows asks for more"
        )
    return None


def _drawn(count: int, most: int) -> list[int]:
    """Places of at most ``most`` of ``count`` rows, in an order drawn with a fixed seed."""
    return random.Random(0).sample(range(count), min(count, most))


def _pairs(
    trainer: Any,
    material: Mapping[str, list[Row]],
    chosen: Mapping[str, list[int]],
    over: Callable[[], bool],
) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Loss before and after of each chosen row, by kind, as far as time allows."""
    found: dict[str, list[tuple[int, dict[str, float]]]] = {kind: [] for kind in chosen}
    longest = max(map(len, chosen.values()))
    with _judging(trainer):
        for start in range(0, longest, _CHUNK):
            for kind, places in chosen.items():
                part = places[start : start + _CHUNK]
                if not part:
                    continue
                if over():
                    return found
                rows = [material[kind][i] for i in part]
                after = [_loss(trainer, row) for row in rows]
                with adapters.named.disabled(trainer.model):
                    before = [_loss(trainer, row) for row in rows]
                for i, row, b, a in zip(part, rows, before, after, strict=True):
                    pair = {"before": round(b, 5), "after": round(a, 5), "tokens": _labelled(row)}
                    found[kind].append((i, pair))
    return found


@contextlib.contextmanager
def _judging(trainer: Any) -> Iterator[None]:
    """No gradients, no dropout; the mode that the model was in comes back."""
    model, was = trainer.model, trainer.model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            yield
    finally:
        model.train(was)


def _loss(trainer: Any, row: Row) -> float:
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row)]))
    return float(trainer.compute_loss(trainer.model, batch))


def _rows(dataset: Any) -> list[Row]:
    """Held-out rows, packed ones taken apart; empty for none and for streams."""
    if dataset is None or not hasattr(dataset, "__len__") or isinstance(dataset, dict):
        return []
    rows: list[Row] = []
    for row in dataset:
        lengths, start = row.get("seq_lengths") or [], 0
        if not lengths:
            rows.append(row)
        for length in lengths:
            end = start + length
            rows.append({k: row[k][start:end] for k in ("input_ids", "labels")})
            start = end
    return rows


def _text_row(text: str, tokenizer: Any) -> Row:
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": ids, "labels": list(ids)}


def _labelled(row: Row) -> int:
    """Labels that count; of a row with one answer 1."""
    labels = row["labels"]
    if not isinstance(labels, list) or len(labels) != len(row["input_ids"]):
        return 1
    return sum(label != IGNORED for label in labels[1:])


def _together(pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Means over tokens, and the difference with its 95% interval."""
    import numpy as np

    pairs = [pair for pair in pairs if pair["tokens"]]
    if len(pairs) < 2:
        return None
    tokens = np.array([pair["tokens"] for pair in pairs], dtype=np.float64)
    sums = {
        side: np.stack([np.array([pair[side] for pair in pairs]) * tokens, tokens], axis=1)
        for side in ("before", "after")
    }  # [n, 2]

    def total(summed: Any) -> float:
        return float(summed[0] / summed[1])

    low, high = bootstrap_difference(sums["after"], sums["before"], total)
    before, after = (total(sums[side].sum(0)) for side in ("before", "after"))
    return {
        "before": round(before, 5),
        "after": round(after, 5),
        "difference": round(after - before, 5),
        "interval": [round(low, 5), round(high, 5)],
        "count": len(pairs),
    }


@dataclass(frozen=True)
class _Show:
    """Rows as people read them."""

    tokenizer: Any
    model: Any
    causal: bool

    def row(self, row: Row) -> dict[str, str]:
        """What was given and what was to be answered, both cut."""
        ids, labels = list(row["input_ids"]), row["labels"]
        if self.causal:
            learnt = [label != IGNORED for label in labels]
            given = [i for i, answer in zip(ids, learnt, strict=True) if not answer]
            answer = [i for i, answer in zip(ids, learnt, strict=True) if answer]
            return {"prompt": self._words(given, end=True), "answer": self._words(answer)}
        names = getattr(self.model.config, "id2label", {}) or {}
        if isinstance(labels, list):
            marked = [names.get(int(v), str(v)) for v in labels if v != IGNORED]
            return {"prompt": self._words(ids), "answer": " ".join(marked)[:_SHOWN_LETTERS]}
        said = names.get(labels, labels) if isinstance(labels, int) else f"{labels:g}"
        return {"prompt": self._words(ids), "answer": str(said)}

    def _words(self, ids: list[int], end: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if len(text) <= _SHOWN_LETTERS:
            return text
        return f"… {text[-_SHOWN_LETTERS:]}" if end else f"{text[:_SHOWN_LETTERS]} …"
