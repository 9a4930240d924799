"""What a run feeds its model: micro-batches, their tokens, and how many steps there are.

What: ``workload`` counts from checked rows and a configuration. How: micro-batches are drawn in a
random order and laid out by the trainers' own collator, until enough of them were seen; sums are
scaled up to the whole run, the largest is the largest seen. Constraint: no weights. Trade-off: the
order is not that of the run, so the largest micro-batch is a likely one and not the very one.

Shapes: b rows of a micro-batch, t tokens of it, n tokens of a document.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finegraft.core.schema import TrainConfig
from finegraft.kernels.document_attention.layout import SHORT, Documents, Rectangle
from finegraft.kernels.encoder_attention.layout import Rows
from finegraft.training.collate import IGNORED, Collator
from finegraft.training.dataset import Rendering, columns

_SEEN_BATCHES = 300
_SEEN_TOKENS = 400_000
_MULTIPLE = 8  # tokens, of padded batches
_LABELLED_MULTIPLE = 32  # rows, see kernels.linear_cross_entropy


@dataclass(frozen=True)
class Workload:
    """Counts over a whole run, unless they say otherwise.

    Attributes:
        steps: Optimizer steps.
        micro_batches: Forward and backward passes.
        tokens: That go through the layers, filling and padding included.
        labelled: Positions whose prediction is scored.
        pairs: Sum of n * n over the documents: what attention works through.
        short_pairs: The part of ``pairs`` in documents whose scores are kept for backward.
        largest: t of the largest micro-batch.
        largest_labelled: Scored positions of the micro-batch that has most of them.
        products: Different products: oneDNN compiles and keeps a kernel for each.
        eval_tokens: Of one evaluation.
        evaluations: How often the held-out rows are read.
        saves: Checkpoints that are written.
    """

    steps: int
    micro_batches: int
    tokens: float
    labelled: float
    pairs: float
    short_pairs: float
    largest: int
    largest_labelled: int
    products: int
    eval_tokens: int = 0
    evaluations: int = 0
    saves: int = 0


@dataclass(frozen=True)
class _Batch:
    tokens: int
    labelled: int
    pairs: int
    short_pairs: int
    rectangles: tuple[tuple[int, int], ...]  # rows and length of those that attend together


def workload(config: TrainConfig, data: Any, *, flat: bool) -> Workload:
    """Count what ``data`` (of ``tasks.check``) becomes under ``config``.

    Args:
        flat: Whether the model takes documents behind one another, without padding.
    """
    rows = rows_of(config, data.train, data.tokenizer)
    seen = _micro_batches(config, rows, flat)
    batches = math.ceil(len(rows) / config.per_device_train_batch_size)
    each_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else 0
    steps = steps or math.ceil(config.num_train_epochs * each_epoch)
    whole, rest = divmod(steps, each_epoch)
    micro = whole * batches + min(batches, rest * config.gradient_accumulation_steps)
    scale = micro / len(seen)
    held = getattr(data, "held_out", None)
    evaluations = _evaluations(config, steps, each_epoch) if held else 0
    return Workload(
        steps=steps,
        micro_batches=micro,
        tokens=scale * sum(b.tokens for b in seen),
        labelled=scale * sum(b.labelled for b in seen),
        pairs=scale * sum(b.pairs for b in seen),
        short_pairs=scale * sum(b.short_pairs for b in seen),
        largest=max(b.tokens for b in seen),
        largest_labelled=max(b.labelled for b in seen),
        products=_products(seen[: int(min(micro, len(seen)))]),
        eval_tokens=sum(len(r["input_ids"]) for r in rows_of(config, held, data.tokenizer))
        if held
        else 0,
        evaluations=evaluations,
        saves=_saves(config, steps, evaluations, each_epoch),
    )


def rows_of(config: TrainConfig, part: Any, tokenizer: Any) -> Sequence[dict[str, Any]]:
    """Rows as the trainer gets them: ids, labels, and ``seq_lengths`` where they are packed."""
    if hasattr(part, "column_names"):
        return list(part)
    how = Rendering(tokenizer, config.max_length, packing=config.packing)
    made = columns(part.input_ids, part.labels, how)
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


def drawn(config: TrainConfig, rows: Sequence[Any]) -> list[list[Any]]:
    """All rows in a random order, in micro-batches."""
    order = list(range(len(rows)))
    random.Random(config.seed).shuffle(order)
    size = config.per_device_train_batch_size
    return [[rows[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def _micro_batches(config: TrainConfig, rows: Sequence[Any], flat: bool) -> list[_Batch]:
    """Some micro-batches, from as many passes over the rows as the run makes, three at most."""
    share = flat and config.share_prefix and config.lora_dropout == 0
    collate = Collator(0, flat=flat, share_prefix=share)
    seen: list[_Batch] = []
    tokens = 0
    passes = 1 if config.max_steps > 0 else min(3, math.ceil(config.num_train_epochs))
    for number in range(passes):
        for batch in drawn(config.model_copy(update={"seed": config.seed + number}), rows):
            seen.append(_measured(config, batch, collate))
            tokens += seen[-1].tokens
            if len(seen) >= _SEEN_BATCHES or tokens > _SEEN_TOKENS:
                return seen
    return seen


def _measured(config: TrainConfig, batch: list[Any], collate: Collator) -> _Batch:
    if config.task != "causal":
        lengths = [len(row["input_ids"]) for row in batch]
        width = -(-max(lengths) // _MULTIPLE) * _MULTIPLE
        tokens = sum(lengths) if collate.flat else width * len(batch)
        scored = len(batch) if config.task == "classification" else sum(lengths)
        layout = Rows(lengths) if collate.flat else Rows([width] * len(batch))
        return _batch(layout.filled if collate.flat else tokens, scored, layout.buckets)
    made = collate(batch)
    shape = made["input_ids"].shape
    lengths = made["seq_lengths"].tolist() if "seq_lengths" in made else [shape[1]] * shape[0]
    found = Documents(lengths, shared="prefix_length" in made).rectangles
    return _batch(shape.numel(), int((made["labels"] != IGNORED).sum()), found)


def _batch(tokens: int, labelled: int, rectangles: Sequence[Rectangle]) -> _Batch:
    squares = [(r.count * r.length**2, r.length) for r in rectangles]
    return _Batch(
        tokens,
        labelled,
        sum(pairs for pairs, _ in squares),
        sum(pairs for pairs, length in squares if length <= SHORT),
        tuple((r.count, r.length) for r in rectangles if r.length <= SHORT),
    )


def _products(seen: Sequence[_Batch]) -> int:
    """Different products of all kinds in these micro-batches."""
    sizes = {b.tokens for b in seen}
    rectangles = {r for b in seen for r in b.rectangles}
    scored = {-(-b.labelled // _LABELLED_MULTIPLE) for b in seen}
    return 32 * len(sizes) + 6 * len(rectangles) + 2 * len(scored)


def _evaluations(config: TrainConfig, steps: int, each_epoch: int) -> int:
    often = config.eval_steps or each_epoch
    # transformers evaluates at the end of an epoch that max_steps cuts short as well
    return steps // often + (not config.eval_steps and steps % often > 0)


def _saves(config: TrainConfig, steps: int, evaluations: int, each_epoch: int) -> int:
    regular = {*range(config.save_steps, steps + 1, config.save_steps), steps}
    if config.task != "causal" and evaluations:
        often = config.eval_steps or each_epoch
        regular |= set(range(often, steps + 1, often))
    return len(regular)
