"""Labelled texts as training sees them, a few at a time, for people to look at.

What: ``rows`` picks rows of classification or token classification out of a specification without
reading the rest, ``shown`` cuts one into tokens and says which of them the model reads. How: the
same columns, texts and tokenizer calls as in training. Constraint: no token is trained here, the
label is, so tokens are ``read`` or ``cut``. Trade-off: only the label of the row is looked at, so
classes that the whole file has are not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import DataError
from finegraft.data import labels, marked, show, sources
from finegraft.data.audit.reading import layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("classification", "token_classification")


@dataclass(frozen=True)
class Labelled:
    """A text with its label. ``place`` is its number over all files, 1-based."""

    place: int
    source: str
    number: int
    format: str
    text: str
    pair: str | None
    label: str


def task_of(
    spec: sources.Spec, mapping: Mapping[str, str] | None = None, task: str | None = None
) -> str:
    """The task that rows are for: what was asked for, or what their columns say.

    Raises:
        DataError: FG-DATA-053, a task that does not exist, and those of reading.
    """
    if task in ("causal", *TASKS):
        return str(task)
    if task is None:
        return "classification" if layout_of(spec, mapping).format is None else "causal"
    raise DataError(
        "FG-DATA-053",
        f"--task {task}, whose rows this command does not know",
        allowed=f"causal, {', '.join(TASKS)}",
        fix="leave --task away",
    )


def rows(
    spec: sources.Spec,
    mapping: Mapping[str, str] | None = None,
    *,
    task: str,
    columns: Mapping[str, str | None] | None = None,
    first: int = 1,
    count: int = 3,
) -> list[Labelled]:
    """Return ``count`` labelled rows from number ``first`` on, counted over all files.

    Args:
        task: One of ``TASKS``.
        columns: ``text``, ``pair`` and ``label``, where they are known.

    Raises:
        ConfigError, DataError: those of reading and of the task; FG-DATA-039, fewer rows.
    """
    picked: list[Labelled] = []
    place = 0
    given = dict(columns or {})
    for part in sources.parts(spec):
        for at in sources.iter_located([part], mapping):
            place += 1
            if place >= first:
                told = f"{at.source}, row {at.number}"
                picked.append(_labelled(at, place, task, given, told))
            if len(picked) == count:
                return picked
    if not picked:
        raise show.no_row(first, place, spec)
    return picked


def _labelled(
    at: Any, place: int, task: str, given: Mapping[str, str | None], told: str
) -> Labelled:
    row = [at.row]
    if task == "token_classification":
        marks = marked.columns(row, given.get("text"), given.get("label"))
        found = marked.read(row, marks, told)
        spans = [f"{found.texts[0][s.start : s.end]!r} {s.label}" for s in found.labels[0]]
        layout, said = f"{marks.text} -> {marks.label}", ", ".join(spans) or "no span"
    else:
        which = labels.columns(row, **given)
        found = labels.read(row, which, told)
        value = found.labels[0]
        said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        layout = " + ".join(filter(None, (which.text, which.pair))) + f" -> {which.label}"
    pair = found.pairs[0] if found.pairs else None
    return Labelled(place, at.source, at.number, layout, found.texts[0], pair, said)


def shown(row: Labelled, tokenizer: PreTrainedTokenizerBase) -> show.Shown:
    """The tokens of a text, and which are cut off because the model does not read that far."""
    both = (row.text, row.pair) if row.pair is not None else (row.text,)
    whole = list(tokenizer(*both)["input_ids"])
    kept = list(tokenizer(*both, truncation=True)["input_ids"])
    cut = len(whole) - len(kept)
    begin = 0  # of what is cut: where the kept tokens stop being those of the whole text
    while begin < len(kept) and kept[begin] == whole[begin]:
        begin += 1
    states = [show.READ] * len(whole)
    states[begin : begin + cut] = [show.CUT] * cut
    return show.assembled(whole, states, tokenizer)
