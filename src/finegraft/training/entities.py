"""How well spans are found, and the loss of one tag a token.

What: precision, recall and F1 of whole spans, together and by type, as conlleval counts them: a
span is right when its words and its type are. Constraint: tokens without a tag (padding, say)
count nowhere. Trade-off: a span that was cut off with its text is not missed; the run says how many
texts were cut.

Shapes: b rows, t tokens, c tags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from finegraft.data.tags import IGNORED, chunks

# Measures that can choose the best epoch, the default first; and whether more is better.
CHOICES = {"f1": True, "precision": True, "recall": True, "accuracy": True, "loss": False}


def _quality(right: int, true: int, said: int) -> dict[str, float]:
    return {
        "precision": right / said if said else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (true + said) if true + said else 0.0,
    }


def measure(true: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Compare tags, row by row and word by word.

    Returns:
        ``f1``, ``precision`` and ``recall`` of all spans, ``accuracy`` of the words' tags, and
        ``per_class``: the same three by type, with ``rows``, how many spans there are.

    Source: CoNLL-2003 shared task, arXiv:cs/0306050.
    """
    right: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    same = words = 0
    for here, there in zip(true, said, strict=True):
        expected, given = set(chunks(here)), set(chunks(there))
        wanted.update(kind for *_, kind in expected)
        found.update(kind for *_, kind in given)
        right.update(kind for *_, kind in expected & given)
        same += sum(a == b for a, b in zip(here, there, strict=True))
        words += len(here)
    whole = _quality(right.total(), wanted.total(), found.total())
    table = {
        kind: {**_quality(right[kind], wanted[kind], found[kind]), "rows": wanted[kind]}
        for kind in sorted({*wanted, *found})
    }
    return {
        "f1": whole["f1"],
        "precision": whole["precision"],
        "recall": whole["recall"],
        "accuracy": same / max(words, 1),
        "per_class": table,
    }


def likeliest(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Ids of the likeliest tags, [b, t], as transformers' ``preprocess_logits_for_metrics``."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return of_tokens(logits, labels.shape[1]).argmax(-1)


def of_tokens(logits: torch.Tensor, length: int) -> torch.Tensor:
    """The logits of the tokens, [b, t, c], without those of a prompt that was trained in front."""
    return logits[:, logits.shape[1] - length :]


class Measure:
    """Transformers' ``compute_metrics`` over the ids of ``likeliest``.

    Args:
        names: Of the tags.

    Attributes:
        last: Everything that ``measure`` returned last; empty before.
    """

    def __init__(self, names: Sequence[str]):
        self.names = np.array(names, dtype=object)
        self.last: dict[str, Any] = {}

    def __call__(self, predicted: Any) -> dict[str, float]:
        said, true = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
        kept = true != IGNORED
        rows = [
            (self.names[a[k]].tolist(), self.names[b[k]].tolist())
            for a, b, k in zip(true, said, kept, strict=True)
        ]
        self.last = measure([a for a, _ in rows], [b for _, b in rows])
        return {name: x for name, x in self.last.items() if isinstance(x, float)}


def loss_of(weights: Sequence[float] | None = None) -> Callable[..., torch.Tensor]:
    """Return the cross-entropy of the tags as transformers' ``compute_loss_func`` takes it.

    Args:
        weights: Of the tags, [c].
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = of_tokens(outputs["logits"], labels.shape[1]).flatten(0, 1).float()  # [b * t, c]
        weight = None if weights is None else torch.tensor(weights, device=logits.device)
        total = F.cross_entropy(logits, labels.flatten(), weight, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
        return total / num_items_in_batch

    return loss
