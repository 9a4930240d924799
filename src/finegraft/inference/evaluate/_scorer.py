"""A measure of somebody's own: a Python file with ``score(prompt, answer, reference)``.

Constraint: what the file does wrong is told with its line or the row, never as a traceback through
this package. The file is run as it stands: pass only files that you trust.
"""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import ConfigError
from finegraft.inference.evaluate._contract import Answered, Metric, mean, with_ones

if TYPE_CHECKING:
    import numpy as np

_ALLOWED = "a Python file with a function score(prompt, answer, reference) that returns a number"
# What a person's function may raise; KeyboardInterrupt and SystemExit are no mistakes of a row.
_MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def from_file(path: str | Path) -> Metric:
    """Make a measure of the function ``score`` in a file: its mean over the rows, more is better.

    Raises:
        ConfigError: FG-EVAL-013, a file that is not there, cannot be run or has no such function;
            later, from the measure, FG-EVAL-014, a row on which it fails.
    """
    path = Path(path)
    if not path.is_file():
        raise _unfit(f"there is no file {path}", "check the path after --scorer")
    spec = importlib.util.spec_from_file_location(f"finegraft_scorer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise _unfit(f"{path} is no Python file", "name it .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except _MISTAKES as error:
        raise _unfit(f"{path} cannot be run: {_where(error, path)}", "correct that line") from error
    function = getattr(module, "score", None)
    if not callable(function):
        raise _unfit(
            f"{path} has no function score",
            "write: def score(prompt, answer, reference): return float(answer == reference)",
        )

    def sums(rows: Answered) -> np.ndarray:
        return with_ones(
            [_scored(function, path, rows, place) for place in range(len(rows.answers))]
        )

    return Metric(about=f"mean of score() in {path.name}", sums=sums, total=mean)


def _scored(function: Callable[..., Any], path: Path, rows: Answered, place: int) -> float:
    given = rows.prompts[place], rows.answers[place], rows.references[place]
    try:
        value = function(*given)
        number = float(value)
    except _MISTAKES as error:
        raise ConfigError(
            "FG-EVAL-014",
            f"score() of {path.name} failed on row {place + 1}: {_where(error, path)}",
            allowed="a number for every row",
            fix=f"correct the function; it was given {given!r:.300}",
        ) from error
    if not math.isfinite(number):
        raise ConfigError(
            "FG-EVAL-014",
            f"score() of {path.name} gave {number} for row {place + 1}",
            allowed="a finite number for every row",
            fix=f"return 0.0 there; it was given {given!r:.300}",
        )
    return number


def _where(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the person's file that it came from."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno})"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


def _unfit(found: str, fix: str) -> ConfigError:
    return ConfigError("FG-EVAL-013", found, allowed=_ALLOWED, fix=fix)
