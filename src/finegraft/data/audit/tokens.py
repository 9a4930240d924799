"""What a tokenizer makes of the rows: tokens, trained tokens, cut and unlearnt rows.

How: the one rendering path that training uses, ``render.render_batch``; a chunk that it refuses is
rendered row by row. Trade-off: about 1,500 rows of 1,000 characters a second, so that above a limit
a sample is taken, every n-th row, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import DataError
from finegraft.data.audit._contract import SHOWN_DETAILS, Finding
from finegraft.data.audit.checks import tokens as codes
from finegraft.data.audit.families import CHECKS
from finegraft.data.audit.judge import Where
from finegraft.data.audit.reading import Bad
from finegraft.data.audit.scan import Progress, chunks
from finegraft.data.render import Rendered, render_batch, stop_token_ids
from finegraft.data.rows import tools_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 20_000


@dataclass
class Tokens:
    """Tokens of the rows that were measured.

    Attributes:
        lengths: Tokens of each measured row.
        trained: Trained tokens of each, within ``max_length``.
        rows: How many rows there are in all.
        step: Every how many rows one is measured; above 1 it is a sample.
        hits: Rows of each code.
        needed: ``max_length`` that would keep every answer whole.
    """

    max_length: int
    rows: int
    step: int = 1
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    hits: dict[str, dict[int, str]] = field(default_factory=dict)
    needed: int = 0

    @property
    def measured(self) -> int:
        """Rows that were rendered."""
        return len(self.lengths)

    @property
    def sampled(self) -> bool:
        """Whether only a part of the rows was measured."""
        return self.step > 1

    def total(self, values: Sequence[int]) -> int:
        """A sum over all rows, estimated where a sample was measured."""
        return sum(values) * self.step

    def findings(self) -> list[Finding]:
        """As findings; of a sample, the rows named are those of the sample."""
        out = []
        part = f"of {self.measured:,} rows looked at" if self.sampled else ""
        for code, rows in sorted(self.hits.items()):
            words = f"max_length={self.needed} would keep all" if code == codes.CUT else ""
            numbers = sorted(rows)
            details = {row: rows[row] for row in numbers[:SHOWN_DETAILS]}
            note = "; ".join(filter(None, (words, part)))
            out.append(Finding(CHECKS[code], numbers, note, details))
        return out


def measure(
    where: Where,
    rows: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    completion_only: bool | None = None,
    limit: int = SAMPLE_ROWS,
    skip: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> Tokens:
    """Render rows and look at their ids.

    Args:
        where: The rows.
        rows: How many there are, refused ones left out.
        tokenizer: With the template that training will use.
        max_length: As in training, in tokens.
        completion_only: As in training.
        limit: Most rows to render.
        skip: Rows that no tokenizer takes.
        progress: Called with the rows that are done, now and then.
    """
    step = max(1, math.ceil(rows / limit))
    out = Tokens(max_length, rows, step)
    ends = frozenset(stop_token_ids(tokenizer))
    for first, chunk in chunks(where.source, where.mapping):
        kept = [item for item in _conversations(chunk, where, first, step) if item[0] not in skip]
        numbers = [number for number, _, _ in kept]
        for number, row in zip(numbers, _rendered(kept, tokenizer, completion_only), strict=True):
            if isinstance(row, DataError):
                out.hits.setdefault(codes.REFUSED, {})[number] = row.found
            else:
                _look(out, number, row, ends, tokenizer.unk_token_id)
        if progress is not None:
            progress(first + len(chunk))
    return out


def _conversations(chunk: list[Any], where: Where, first: int, step: int) -> list[Any]:
    """Number, messages and tools of the rows of the sample that can be read."""
    assert where.layout.format is not None
    out = []
    for number, row in enumerate(chunk, first + 1):
        if (number - 1) % step or isinstance(row, Bad):
            continue
        try:
            messages, tools = where.layout.format.to_messages(row), tools_of([row])
        except (DataError, RecursionError):
            continue  # a finding of its own
        out.append((number, messages, tools[0] if tools else None))
    return out


def _rendered(kept: list[Any], tokenizer: Any, completion_only: bool | None) -> list[Any]:
    """Each row rendered, or the error that it was refused with; halves are tried after one."""
    if not kept:
        return []
    messages, tools = [m for _, m, _ in kept], [t for _, _, t in kept]
    try:
        return [*render_batch(messages, tokenizer, completion_only=completion_only, tools=tools)]
    except DataError as error:
        if len(kept) == 1:
            return [error]
    half = len(kept) // 2
    return [
        row
        for part in (kept[:half], kept[half:])
        for row in _rendered(part, tokenizer, completion_only)
    ]


def _look(
    out: Tokens, number: int, row: Rendered, ends: frozenset[int], unknown: int | None
) -> None:
    ids, trained, limit = row.input_ids, row.trained, out.max_length
    learnt = sum(trained[1:limit])
    out.lengths.append(len(ids))
    out.trained.append(learnt)
    last = max((i for i, yes in enumerate(trained) if yes), default=-1)
    if not learnt:
        words = f"{len(ids):,} tokens" if last >= 0 else "no answer is to be learnt"
        out.hits.setdefault(codes.MASKED, {})[number] = words
    if last >= limit:
        out.needed = max(out.needed, last + 1)
        if learnt:
            out.hits.setdefault(codes.CUT, {})[number] = f"{last + 1:,} tokens"
    elif learnt and not any(yes and i in ends for i, yes in zip(ids, trained, strict=True)):
        out.hits.setdefault(codes.NO_END, {})[number] = "the answer is open"
    if unknown is not None and unknown not in ends and unknown in ids:
        out.hits.setdefault(codes.UNKNOWN, {})[number] = f"{ids.count(unknown):,} of them"
