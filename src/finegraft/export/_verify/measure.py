"""Numbers of an export beside those of the trained model.

What: ``measure`` makes the checks of probabilities. How: the trained model is scored with its
adapter and without; the export's difference to the model without it, measured along what the
adapter does, is the adapter's share: 1 as trained, 0 not merged, 2 merged twice. Constraint: the
share is looked at only where the effect is larger than what the format may change. Trade-off: an
adapter that hardly changes anything is compared by probabilities alone.

Shapes: n compared tokens, v vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finegraft.export._contract import Check
from finegraft.export._verify import readers
from finegraft.export._verify.prompts import Row
from finegraft.export._verify.report import VISIBLE, Tolerance

_LIKELY = -10.0  # log-probabilities below this differ much and change no answer


@dataclass(frozen=True)
class Trained:
    """Scores of the trained model.

    Attributes:
        scores: With its adapter.
        base: Without; None where there is no adapter.
    """

    scores: list[torch.Tensor]
    base: list[torch.Tensor] | None


def score_trained(model: Any, rows: Sequence[Row]) -> Trained:
    """Score the trained model with its adapter and, where it can be left out, without."""
    scores = readers.score(model, rows)
    base = None
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            base = readers.score(model, rows)
    return Trained(scores, base)


def measure(
    rows: Sequence[Row], trained: Trained, found: Sequence[torch.Tensor], allowed: Tolerance
) -> tuple[list[Check], str]:
    """Return the checks ``log_probs``, ``adapter`` and ``perplexity``, and the worst prompt."""
    errors = [error(*three) for three in zip(rows, trained.scores, found, strict=True)]
    at = max(range(len(errors)), key=lambda i: errors[i] if errors[i] == errors[i] else math.inf)
    mean = sum(errors) / len(errors)
    mean = math.inf if mean != mean else mean
    checks = [Check("log_probs", mean, allowed.log_probs, mean <= allowed.log_probs)]
    seen = share(trained, found, allowed.log_probs * VISIBLE)
    if seen is not None:
        off = abs(seen - 1)
        checks.append(Check("adapter", off, allowed.adapter, off <= allowed.adapter))
    if rows[0].scored:
        off = _perplexity(rows, trained.scores, found)
        checks.append(Check("perplexity", off, allowed.perplexity, off <= allowed.perplexity))
    return checks, rows[at].text


def error(row: Row, wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean absolute difference of the compared tokens, or of all labels, in nats."""
    sides = (_chosen(row, scores).clamp(min=_LIKELY) for scores in (wanted, found))
    return float((next(sides) - next(sides)).abs().mean())


def distance(
    rows: Sequence[Row], one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]
) -> float:
    """Mean of ``error`` over all rows; infinite where a row could not be scored."""
    found = sum(error(*three) for three in zip(rows, one, two, strict=True)) / len(rows)
    return math.inf if found != found else found


def _chosen(row: Row, scores: torch.Tensor) -> torch.Tensor:
    if not row.scored:
        return scores[0]
    ids = torch.tensor([row.ids[place] for place in row.scored])
    if int(ids.max()) >= scores.shape[-1]:
        return torch.full((len(ids),), torch.nan)
    return scores.gather(1, ids[:, None])[:, 0]


def _perplexity(
    rows: Sequence[Row], wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> float:
    """Relative difference of the perplexities over all rows."""
    sums = [
        torch.cat([_chosen(row, s) for row, s in zip(rows, scores, strict=True)]).double().mean()
        for scores in (wanted, found)
    ]
    off = abs(math.exp(min(50.0, float(sums[0] - sums[1]))) - 1)
    return math.inf if off != off else off


def share(trained: Trained, found: Sequence[torch.Tensor], visible: float) -> float | None:
    """How much of the adapter is in the export; None where its effect is below ``visible``."""
    if trained.base is None:
        return None
    along = total = 0.0
    count = 0
    for with_it, without, there in zip(trained.scores, trained.base, found, strict=True):
        v = min(with_it.shape[-1], without.shape[-1], there.shape[-1])
        with_it, without, there = with_it[:, :v], without[:, :v], there[:, :v]
        known = there.isfinite() & without.isfinite()
        known &= (with_it > _LIKELY) | (without > _LIKELY)
        effect = (with_it - without)[known].double()
        along += float(((there - without)[known].double() * effect).sum())
        total += float((effect * effect).sum())
        count += int(known.sum())
    if count == 0 or math.sqrt(total / count) < visible:
        return None
    return along / total


@contextlib.contextmanager
def scaled(model: Any, factor: float) -> Any:
    """Run the block with the LoRA of ``model`` times ``factor``."""
    layers = [m for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] *= factor
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.scaling.update(values)
