"""What a sweep varies: values of keys, and the names of the runs that come of them.

What: ``axes`` reads ``r: 8,16,32`` and ``learning_rate: 1e-5..1e-3``, ``grid`` lists every
combination, ``name`` makes a folder's name of one. How: the values are YAML between commas, so that
a list stays one value in brackets. Constraint: the same values have the same name in every call,
which is how a stopped sweep finds its runs; a name needs no quotes in a shell. Trade-off: a range
has no steps, so a grid refuses it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from finegraft.core.errors import ConfigError, did_you_mean
from finegraft.core.schema import TrainConfig

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")
_LOGARITHMIC_FROM = 10.0  # times between the ends of a range
_LONGEST_NAME = 100
# Keys that a run is, rather than has.
NEVER = ("output", "overwrite", "task")


@dataclass(frozen=True)
class Axis:
    """What one key is given: listed values, or a range.

    Attributes:
        key: Of ``TrainConfig``.
        values: Listed ones; empty for a range.
        ends: Least and greatest of a range; both whole numbers: only whole ones are tried.
    """

    key: str
    values: tuple[Any, ...] = ()
    ends: tuple[float, float] | None = None

    @property
    def whole(self) -> bool:
        """Whether a range has whole numbers only."""
        return self.ends is not None and all(isinstance(end, int) for end in self.ends)

    @property
    def logarithmic(self) -> bool:
        """Whether every factor of a range is as likely, instead of every number."""
        return self.ends is not None and 0 < self.ends[0] * _LOGARITHMIC_FROM <= self.ends[1]

    def written(self) -> Any:
        """As a configuration file has it, which ``axes`` reads back."""
        return f"{self.ends[0]}..{self.ends[1]}" if self.ends else list(self.values)

    def tried(self) -> tuple[Any, ...]:
        """Values that must be good ones if all are."""
        return self.ends or self.values


def axes(given: Mapping[str, Any]) -> list[Axis]:
    """Read what is varied.

    Args:
        given: Key to text with commas (``8,16,32``), a range (``1e-5..1e-3``) or a list.

    Raises:
        ConfigError: FG-SWEEP-001 a key that cannot be varied, FG-SWEEP-002 values that cannot be
            read.
    """
    return [_axis(key.replace("-", "_"), value) for key, value in given.items()]


def _axis(key: str, value: Any) -> Axis:
    known = [name for name in TrainConfig.model_fields if name not in NEVER]
    if key not in known:
        raise ConfigError(
            "FG-SWEEP-001",
            f"a sweep cannot vary '{key}'",
            allowed="keys of `finegraft train`, but for " + ", ".join(NEVER),
            fix=f"one sweep for each {key}" if key in NEVER else did_you_mean(key, known),
        )
    if isinstance(value, str):
        found = _RANGE.fullmatch(value)
        if found:
            return Axis(key, ends=_ends(key, *found.groups()))
        value = _listed(key, value)
    values = [_number(one) for one in value] if isinstance(value, list) else [_number(value)]
    if not values:
        raise _unreadable(key, value)
    return Axis(key, tuple(one for i, one in enumerate(values) if one not in values[:i]))


def _listed(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise _unreadable(key, text) from error


def _unreadable(key: str, value: Any) -> ConfigError:
    return ConfigError(
        "FG-SWEEP-002",
        f"--set {key}={value} holds no values that can be read",
        allowed="values between commas, or a range LEAST..GREATEST",
        fix="for example --set r=8,16,32 or --set learning_rate=1e-5..1e-3; a value that is a list "
        "stands in brackets: --set 'target_modules=[q_proj,v_proj],[q_proj]'",
    )


def _ends(key: str, low: str, high: str) -> tuple[float, float]:
    first, second = (_number(yaml.safe_load(end)) for end in (low, high))
    if not first < second:
        raise _unreadable(key, f"{low}..{high}")
    return first, second


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text."""
    if not isinstance(value, str) or not re.fullmatch(_NUMBER, value):
        return value
    return float(value)


def grid(space: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every combination, the last key varying first.

    Raises:
        ConfigError: FG-SWEEP-003, a range.
    """
    ranges = [axis.key for axis in space if axis.ends]
    if ranges:
        raise ConfigError(
            "FG-SWEEP-003",
            f"{', '.join(ranges)}: a grid cannot try a whole range",
            allowed="listed values, or a search",
            fix=f"--set {ranges[0]}=VALUE,VALUE, or add --search optuna --trials 20",
        )
    keys = [axis.key for axis in space]
    return [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*(axis.values for axis in space))
    ]


def size(space: Sequence[Axis]) -> int | None:
    """How many combinations there are; None with a range of broken numbers."""
    counts = [
        len(a.values) if not a.ends else int(a.ends[1] - a.ends[0]) + 1 if a.whole else None
        for a in space
    ]
    known = [count for count in counts if count is not None]
    return math.prod(known) if len(known) == len(counts) else None


def shown(value: Any) -> str:
    """A value as people write it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False).replace('"', "")
    return str(value)


def label(values: Mapping[str, Any]) -> str:
    """One combination in words."""
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def name(values: Mapping[str, Any]) -> str:
    """The folder of one combination."""
    exact = ",".join(f"{key}={_exact(value)}" for key, value in values.items())
    plain = re.sub(r"[^\w.+,=-]", "-", exact)
    if plain == exact and len(plain) <= _LONGEST_NAME:
        return plain
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{plain[: _LONGEST_NAME - 9]}-{digest}"


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
