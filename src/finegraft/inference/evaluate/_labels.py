"""Measures of classifiers, with intervals: classes, several labels, values, spans of texts.

What: ``judge_labels`` and ``judge_spans`` take what is true and what one or two models said. How:
as for answers, sums of rows and a total; an F1 comes from what each row adds to right, true and
said of every label. Constraint: the values are those of the training's own measures, label by
label. Trade-off: correlations of values have no interval.

Shapes: n rows, c labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finegraft.data.labels import CLASSES, SEVERAL
from finegraft.inference.evaluate._compare import judged
from finegraft.inference.evaluate._contract import Metric, mean, with_ones

Span = tuple[int, int, str]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _macro_f1(row: np.ndarray) -> float:
    """From right, true and said of c labels, [3 c]; labels that occur nowhere count nowhere."""
    right, true, said = row.reshape(3, -1)
    met = true + said > 0
    return float(_ratio(2 * right, true + said)[met].mean()) if met.any() else 0.0


def _micro_f1(row: np.ndarray) -> float:
    right, true, said = row.reshape(3, -1).sum(1)
    return float(2 * right / (true + said)) if true + said else 0.0


def _precision(row: np.ndarray) -> float:
    return float(row[0] / row[2]) if row[2] else 0.0


def _recall(row: np.ndarray) -> float:
    return float(row[0] / row[1]) if row[1] else 0.0


def _not_an_answer(rows: Any) -> np.ndarray:
    raise NotImplementedError("measures of labels take sums, see judge_labels")


def _metric(total: Callable[[np.ndarray], float], **more: Any) -> Metric:
    return Metric(about="", sums=_not_an_answer, total=total, **more)


_MEASURES: dict[str, Metric] = {
    "accuracy": _metric(mean, share=True),
    "macro_f1": _metric(_macro_f1),
    "micro_f1": _metric(_micro_f1),
    "loss": _metric(mean, better="less"),
    "mse": _metric(mean, better="less"),
    "mae": _metric(mean, better="less"),
    "f1": _metric(_micro_f1),
    "precision": _metric(_precision),
    "recall": _metric(_recall),
}


def _counts(true: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Right, true and said of each label, [n, 3 c]; both given as 0 and 1, [n, c]."""
    return np.concatenate([true * said, true, said], axis=1).astype(np.float64)


def _sums(problem_type: str, true: np.ndarray, said: np.ndarray) -> dict[str, np.ndarray]:
    """What each row adds to every measure of a problem.

    Args:
        said: Probabilities of the labels, [n, c]; values, [n].
    """
    if problem_type == CLASSES:
        count, ids, best = said.shape[1], true.astype(int), said.argmax(1)
        of_true = said[np.arange(len(ids)), ids]
        return {
            "accuracy": with_ones((ids == best).astype(float)),
            "macro_f1": _counts(np.eye(count)[ids], np.eye(count)[best]),
            "loss": with_ones(-np.log(np.clip(of_true, 1e-12, None))),
        }
    if problem_type == SEVERAL:
        chosen = (said >= 0.5).astype(float)
        counts = _counts(true, chosen)
        right = (true == chosen).all(1).astype(float)
        return {"accuracy": with_ones(right), "micro_f1": counts, "macro_f1": counts}
    gap = said.reshape(-1) - true.reshape(-1)
    return {"mse": with_ones(np.square(gap)), "mae": with_ones(np.abs(gap))}


def judge_labels(
    problem_type: str, true: Sequence[Any], said: Any, other: Any = None
) -> dict[str, dict[str, Any]]:
    """Measures of a classifier, or of two on the same rows, with the keys of ``compare``.

    Args:
        problem_type: As in transformers.
        true: Ids, [n]; 0.0 and 1.0 for several labels, [n, c]; values, [n].
        said: Probabilities of the labels, [n, c], or values, [n].
        other: The same of the model that it is compared with.
    """
    right = np.asarray(true, dtype=np.float64)
    sums = _sums(problem_type, right, np.asarray(said, dtype=np.float64))
    others: dict[str, Any] = {}
    if other is not None:
        others = _sums(problem_type, right, np.asarray(other, dtype=np.float64))
    return {name: judged(_MEASURES[name], own, others.get(name)) for name, own in sums.items()}


def judge_spans(
    true: Sequence[set[Span]], said: Sequence[set[Span]], other: Sequence[set[Span]] | None = None
) -> dict[str, dict[str, Any]]:
    """F1, precision and recall of whole spans, with the keys of ``compare``.

    Args:
        true: First character, one past the last, and type of each span, for every text.
        said: The same, of the model.
        other: The same, of the model that it is compared with.
    """

    def counted(found: Sequence[set[Span]]) -> np.ndarray:
        pairs = zip(true, found, strict=True)
        return np.asarray([[len(a & b), len(a), len(b)] for a, b in pairs], dtype=np.float64)

    own, others = counted(said), counted(other) if other is not None else None
    return {name: judged(_MEASURES[name], own, others) for name in ("f1", "precision", "recall")}
