"""What every code means: cause, cure and an example.

What: ``explain`` for one code, ``codes`` for all of them. How: ``codes.json`` holds what the source
says at each place that makes an error (found, allowed, fix), and the findings of the data check and
of the watch over training, written by ``docs/make.py``; ``texts.yaml`` holds longer texts, written
by hand, for the codes that people meet most. Constraint: no code of the source is missing, which a
test proves. Trade-off: a code without a text of its own is explained by its messages, in which
``<name>`` stands for what is filled in at run time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """One place in the source that makes an error; see ``FinegraftError`` for the texts."""

    kind: str
    builtin: str
    file: str
    found: str
    allowed: str
    fix: str

    def message(self, code: str) -> str:
        """The error as it is shown."""
        lines = [f"{code}: {self.found}"]
        lines += [f"  allowed: {self.allowed}"] if self.allowed else []
        lines += [f"  fix:     {self.fix}"] if self.fix else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What a code means.

    Attributes:
        code: ``FG-<PART>-<NNN>``.
        part: The part of finegraft that it belongs to, in words.
        title: One line.
        cause: What led there.
        cure: What to do.
        example: Something that gives this error, or the message itself.
        places: Where the source makes it; empty for a finding, which is no error.
    """

    code: str
    part: str
    title: str
    cause: str
    cure: str
    example: str
    places: list[Place] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@cache
def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "codes.json").read_text(encoding="utf-8"))
    return found


@cache
def texts() -> dict[str, dict[str, str]]:
    """The texts written by hand: title, cause, cure and example by code."""
    found: dict[str, dict[str, str]] = yaml.safe_load(
        (FOLDER / "texts.yaml").read_text(encoding="utf-8")
    )
    return found


def codes() -> list[str]:
    """Every code that an error or a finding can have, sorted."""
    return sorted({**_known()["errors"], **_known()["findings"]})


def part_of(code: str) -> str:
    """The part of finegraft that a code belongs to, in words."""
    name = code.split("-")[1]
    return str(_known()["parts"].get(name, name))


def explain(code: str) -> Explanation:
    """Explain a code that is in ``codes()``.

    Raises:
        KeyError: It is not.
    """
    if code in _known()["findings"]:
        return Explanation(code=code, part=part_of(code), **_known()["findings"][code])
    places = [Place(**values) for values in _known()["errors"][code]]
    own = texts().get(code, {})
    first = places[0]
    fixes = dict.fromkeys(place.fix for place in places if place.fix)
    return Explanation(
        code=code,
        part=part_of(code),
        title=own.get("title", first.found),
        cause=own.get("cause", "").strip() or _found(places),
        cure=own.get("cure", "").strip() or "\n".join(fixes),
        example=own.get("example", "").rstrip() or first.message(code),
        places=places,
    )


def _found(places: list[Place]) -> str:
    """What was found and what would have been accepted, at every place."""
    lines = []
    for place in dict.fromkeys((p.found, p.allowed) for p in places):
        found, allowed = place
        lines.append(f"finegraft found: {found}" + (f"\nallowed: {allowed}" if allowed else ""))
    return "\n".join(lines)
