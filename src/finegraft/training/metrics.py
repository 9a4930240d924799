"""How good a classifier is, in plain numpy.

What: accuracy, precision, recall, F1 and the confusion matrix of classes; micro and macro F1 of
several labels a row; squared error and correlations of values. How: everything about classes is
read off the confusion matrix. Constraint: a label that is neither true nor predicted anywhere has
no F1 and is left out of the mean; one without a right answer counts 0. Trade-off: no dependency and
no network, and so only the measures that are named here.

Shapes: n rows, c labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finegraft.data.labels import CLASSES, SEVERAL, VALUES

# Measures that can choose the best epoch, the default first; and whether more is better.
CHOICES: dict[str, dict[str, bool]] = {
    CLASSES: {"macro_f1": True, "accuracy": True, "loss": False},
    SEVERAL: {"micro_f1": True, "macro_f1": True, "accuracy": True, "loss": False},
    VALUES: {"mse": False, "mae": False, "pearson": True, "spearman": True, "loss": False},
}
THRESHOLD = 0.5  # probability from which a label of several is said


def confusion(true: np.ndarray, said: np.ndarray, count: int) -> np.ndarray:
    """Rows by true class and predicted class, [c, c].

    Args:
        true: Ids, [n].
        said: Ids, [n].
        count: c.
    """
    cells = np.asarray(true, dtype=np.int64) * count + np.asarray(said, dtype=np.int64)
    return np.bincount(cells, minlength=count * count).reshape(count, count)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _each(right: np.ndarray, true: np.ndarray, said: np.ndarray, names: Sequence[str]) -> Any:
    """Mean F1, and precision, recall, F1 and rows of each label by name; counts are [c]."""
    precision, recall = _ratio(right, said), _ratio(right, true)
    f1 = _ratio(2 * right, true + said)
    met = true + said > 0
    table = {
        name: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "rows": int(true[i]),
        }
        for i, name in enumerate(names)
    }
    return float(f1[met].mean()) if met.any() else 0.0, table


def classes(true: np.ndarray, said: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Measures of one class a row (or a token).

    Args:
        true: Ids, [n].
        said: Ids, [n].
        names: Of the c classes.

    Returns:
        ``accuracy``, ``macro_f1``, ``per_class`` by name, and ``confusion``, true class by
        predicted class.
    """
    matrix = confusion(true, said, len(names))
    macro, table = _each(np.diag(matrix), matrix.sum(1), matrix.sum(0), names)
    return {
        "accuracy": float(np.diag(matrix).sum() / max(matrix.sum(), 1)),
        "macro_f1": macro,
        "per_class": table,
        "confusion": matrix.tolist(),
    }


def several(true: np.ndarray, said: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Measures of several labels a row.

    Args:
        true: 0 or 1, [n, c].
        said: 0 or 1, [n, c].
        names: Of the c labels.

    Returns:
        ``accuracy`` (rows with every label right), ``micro_f1``, ``macro_f1``, ``per_class``.
    """
    true, said = np.asarray(true, dtype=bool), np.asarray(said, dtype=bool)
    right = (true & said).sum(0)
    macro, table = _each(right, true.sum(0), said.sum(0), names)
    whole = true.sum() + said.sum()
    return {
        "accuracy": float((true == said).all(1).mean()),
        "micro_f1": float(2 * right.sum() / whole) if whole else 0.0,
        "macro_f1": macro,
        "per_class": table,
    }


def values(true: np.ndarray, said: np.ndarray) -> dict[str, Any]:
    """Measures of predicted values, [n]; a correlation with a constant is 0.

    Returns:
        ``mse``, ``mae``, ``pearson``, ``spearman``.
    """
    true, said = np.asarray(true, dtype=np.float64), np.asarray(said, dtype=np.float64)
    return {
        "mse": float(np.square(true - said).mean()),
        "mae": float(np.abs(true - said).mean()),
        "pearson": _correlation(true, said),
        "spearman": _correlation(_ranks(true), _ranks(said)),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[place]


def measure(
    problem_type: str, names: Sequence[str], logits: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """All measures of a problem from what the model said, [n, c], and the labels of the trainer."""
    if problem_type == CLASSES:
        return classes(labels, logits.argmax(-1), names)
    if problem_type == SEVERAL:
        # A probability of at least 0.5 is a logit of at least 0.
        return several(labels, logits >= np.log(THRESHOLD / (1 - THRESHOLD)), names)
    return values(labels.reshape(-1), logits.reshape(-1))


def numbers(measured: dict[str, Any]) -> dict[str, float]:
    """The single numbers of what ``measure`` returned, without tables."""
    return {name: x for name, x in measured.items() if isinstance(x, int | float)}
