"""What every measure exports as ``METRIC``.

How: a measure turns each row into a few sums and a total of sums into one number, so that values,
intervals and differences of any measure are computed by the same few lines. A mean is the sums
(x, 1) and the total a / b. Constraint: ``total`` of one row's sums is that row's own score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finegraft.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Answered:
    """What a model did with the rows.

    Attributes:
        prompts: The question of each row, as text; empty for raw text.
        references: What should have been said; None for a row without an answer, raw text say.
        answers: What was said; empty where nothing was asked.
        losses: Negative log-likelihood of each reference, in nats, and its tokens; [n, 2].
    """

    prompts: list[str]
    references: list[Any]
    answers: list[str]
    losses: np.ndarray | None = None

    def asked(self) -> list[int]:
        """Places of the rows that have a reference."""
        return [place for place, text in enumerate(self.references) if text is not None]

    def select(self, places: Sequence[int]) -> Answered:
        """The rows at ``places``, in that order."""
        return Answered(
            [self.prompts[i] for i in places],
            [self.references[i] for i in places],
            [self.answers[i] for i in places],
            None if self.losses is None else self.losses[list(places)],
        )


@dataclass(frozen=True)
class Metric:
    """One measure.

    Attributes:
        about: One line: what it says, and of what size it is.
        sums: What each row adds, [n, k].
        total: The measure of added-up sums, [k].
        better: Whether a good model has more or less of it.
        reads: ``answers``, which have to be generated, or ``losses``.
        share: A share of rows, whose interval is Wilson's.
        package: The library that computes it, as pip names it; None: none but numpy.
    """

    about: str
    sums: Callable[[Answered], np.ndarray]
    total: Callable[[np.ndarray], float]
    better: Literal["more", "less"] = "more"
    reads: Literal["answers", "losses"] = "answers"
    share: bool = False
    package: str | None = None


def mean(row: np.ndarray) -> float:
    """The total of sums (x, 1)."""
    return float(row[0] / row[1]) if row[1] else 0.0


def with_ones(values: Sequence[float]) -> np.ndarray:
    """Sums of a mean, [n, 2]."""
    import numpy as np

    each = np.asarray(values, dtype=np.float64)
    return np.stack([each, np.ones_like(each)], axis=1)


def losses_of(rows: Answered) -> np.ndarray:
    """The losses of rows that have some.

    Raises:
        DataError: FG-EVAL-012, they were not computed.
    """
    if rows.losses is None:
        raise DataError(
            "FG-EVAL-012",
            "the losses of the rows were not computed",
            allowed="Answered(..., losses=...) with nats and tokens of each row",
            fix="leave loss and perplexity out, or pass losses",
        )
    return rows.losses


def require_package(name: str, package: str) -> None:
    """Prove that the library of a measure is installed.

    Raises:
        ConfigError: FG-EVAL-011, it is not.
    """
    from importlib import util

    if util.find_spec(package.replace("-", "_")) is None:
        raise ConfigError(
            "FG-EVAL-011",
            f"the metric '{name}' needs {package}, which is not installed",
            allowed="loss, perplexity and exact_match need nothing more",
            fix='pip install "finegraft[eval]"',
        )
