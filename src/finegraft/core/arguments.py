"""Answer keyword arguments: renamed ones are translated, unknown ones refused by name.

What: one function that turns the keywords a caller wrote, in whatever year, into today's. How: a
table of ``Rename`` and ``Drop`` rules. Constraint: one warning each and nothing silent; a name that
no rule and no signature knows is an error with a near name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finegraft.core.errors import ArgumentError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rename:
    """An argument that has another name today; ``convert`` translates its value."""

    to: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Drop:
    """An argument without a meaning today or here, and why."""

    because: str


Rules = Mapping[str, Rename | Drop]


def translate(where: str, given: Mapping[str, Any], known: Collection[str], rules: Rules) -> dict:
    """Return ``given`` under today's names.

    Args:
        where: The function or class, for messages.
        given: Keywords as the caller wrote them.
        known: Names that are accepted as they are.
        rules: What to do with the others.

    Raises:
        ArgumentError: FG-ARG-001 unknown name, FG-ARG-002 an old and a new name for one setting.
    """
    out: dict[str, Any] = {}
    for name, value in given.items():
        rule = None if name in known else rules.get(name)
        if name not in known and rule is None:
            raise ArgumentError(
                "FG-ARG-001",
                f"{where} has no argument '{name}'",
                allowed="the names in its signature",
                fix=did_you_mean(name, [*known, *rules]),
            )
        if isinstance(rule, Drop):
            logger.warning("%s: '%s' is ignored: %s", where, name, rule.because)
            continue
        if isinstance(rule, Rename):
            if rule.to in given:
                raise ArgumentError(
                    "FG-ARG-002",
                    f"{where} got both '{name}' and '{rule.to}', which mean the same",
                    allowed="one of the two",
                    fix=f"remove '{name}'",
                )
            logger.warning("%s: '%s' is called '%s' now", where, name, rule.to)
            name, value = rule.to, rule.convert(value)
        out[name] = value
    return out
