"""Conversations of several files, mixed and weighted the same way every time.

What: ``read`` makes one corpus of all parts of a specification, each part in its own layout. How:
the parts are spread evenly over one another, so that the last tenth of the rows holds a tenth of
each; a weight says how often a row is trained on in an epoch, and the seed which rows a fraction
takes. Constraint: rows are held out before any is repeated, so no copy of a held-out row is
trained. Trade-off: spreading needs the number of rows of each part, so parts are read whole.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finegraft.core.errors import ConfigError, DataError
from finegraft.data import rows as layouts
from finegraft.data import sources
from finegraft.data.conversation import Message


@dataclass(frozen=True)
class Corpus:
    """Conversations with what belongs to each of them.

    Attributes:
        tools: JSON schemas of tools for each row; None where no row has any.
        origins: ``b.csv, row 3`` for each row; None where everything is from one file, whose
            messages say ``row 3``.
        copies: How often each row is trained on in an epoch.
        format: The layout, or the layouts joined by commas.
    """

    conversations: list[list[Message]]
    tools: list[Any] | None
    origins: list[str] | None
    copies: list[int]
    format: str

    def __len__(self) -> int:
        return len(self.conversations)

    def select(self, places: Sequence[int]) -> Corpus:
        """The rows at ``places``, in that order."""
        return Corpus(
            [self.conversations[i] for i in places],
            None if self.tools is None else [self.tools[i] for i in places],
            None if self.origins is None else [self.origins[i] for i in places],
            [self.copies[i] for i in places],
            self.format,
        )

    def hold_out(self, fraction: float) -> tuple[Corpus, Corpus]:
        """Rows to train on and the last ``fraction`` of them, at least one, to evaluate with."""
        size = max(1, round(len(self) * fraction)) if fraction else 0
        cut = len(self) - size
        return self.select(range(cut)), self.select(range(cut, len(self)))

    def repeated(self) -> Corpus:
        """Every row as often as its weight says."""
        if all(count == 1 for count in self.copies):
            return self
        return self.select([i for i, count in enumerate(self.copies) for _ in range(count)])


def read(spec: sources.Spec, mapping: Mapping[str, str] | None = None, seed: int = 0) -> Corpus:
    """Read, recognise and mix the parts of a specification.

    Args:
        spec: As in ``sources.parts``.
        mapping: Columns to rename in the parts that have no ``map`` of their own.
        seed: Chooses the rows that a fractional weight takes.

    Raises:
        ConfigError, DataError: those of ``sources.iter_rows``, ``rows.detect`` and
            ``rows.conversations``, naming the file where there are several.
    """
    found = [_read_part(part, mapping or {}) for part in sources.parts(spec)]
    several = len(found) > 1 or any(len(set(names)) > 1 for _, names, _ in found)
    corpora = []
    for place, (part, names, located) in enumerate(found):
        told = [f"{at.source}, row {at.number}" for at in located] if several else None
        with _named(names[0] if len(found) > 1 else None):
            corpora.append(_corpus(part, located, told, random.Random(f"{seed} {place}")))
    return corpora[0] if len(corpora) == 1 else _spread(corpora)


def read_rows(
    spec: sources.Spec, mapping: Mapping[str, str] | None = None, task: str = "classification"
) -> list[dict[str, Any]]:
    """Rows of all parts one after another, for tasks that split and balance them by label.

    Raises:
        ConfigError: as ``require_no_weights``; DataError: as ``sources.iter_rows``.
    """
    require_no_weights(spec, task)
    return list(sources.iter_rows(spec, mapping))


def require_no_weights(spec: sources.Spec, task: str) -> None:
    """Prove that no part has a weight, which a task would ignore.

    Raises:
        ConfigError: FG-DATA-036.
    """
    for part in sources.parts(spec):
        if part.weight != 1.0:
            raise ConfigError(
                "FG-DATA-036",
                f"{part.path} has the weight {part.weight:g} with task '{task}'",
                allowed="files without weights in this task",
                fix="remove the weight; class_weights=balanced weighs rare labels",
            )


def _read_part(
    part: sources.Part, mapping: Mapping[str, str]
) -> tuple[sources.Part, list[str], list[sources.Located]]:
    located = list(sources.iter_located([part], mapping))
    return part, list(dict.fromkeys(at.source for at in located)), located


@contextlib.contextmanager
def _named(source: str | None) -> Iterator[None]:
    """Put the file in front of what is wrong with its columns."""
    try:
        yield
    except DataError as error:
        if source is None or error.found.startswith(source):
            raise
        found = f"{source}: {error.found}"
        raise DataError(error.code, found, allowed=error.allowed, fix=error.fix) from error


def _corpus(
    part: sources.Part,
    located: list[sources.Located],
    told: list[str] | None,
    dice: random.Random,
) -> Corpus:
    rows = [at.row for at in located]
    name, layout = layouts.detect(rows)
    return Corpus(
        layouts.conversations(rows, layout, told),
        layouts.tools_of(rows, told),
        told,
        _copies(len(rows), part.weight, dice),
        name,
    )


def _copies(count: int, weight: float, dice: random.Random) -> list[int]:
    """``weight`` copies of each row; a random share of the rows has the fraction that is left."""
    whole, rest = divmod(weight, 1)
    more = round(rest * count) if whole or not rest else max(1, round(rest * count))
    chosen = set(dice.sample(range(count), more))
    return [int(whole) + (i in chosen) for i in range(count)]


def _spread(corpora: list[Corpus]) -> Corpus:
    """One corpus in which every part is as dense at the end as at the start."""
    order = sorted(
        ((i + 0.5) / len(corpus), which, i)
        for which, corpus in enumerate(corpora)
        for i in range(len(corpus))
    )
    have_tools = any(corpus.tools is not None for corpus in corpora)
    return Corpus(
        [corpora[w].conversations[i] for _, w, i in order],
        [(corpora[w].tools or [None] * len(corpora[w]))[i] for _, w, i in order]
        if have_tools
        else None,
        [(corpora[w].origins or [])[i] for _, w, i in order],
        [corpora[w].copies[i] for _, w, i in order],
        ", ".join(dict.fromkeys(corpus.format for corpus in corpora)),
    )
