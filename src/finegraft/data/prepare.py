"""From conversations to training rows: ids, labels, counts, and what a person should know.

What: every conversation is rendered, cut to the longest length, labelled, and kept when something
in it can be learnt. How: rendering in chunks, so that offsets of a large set are never held at
once. Constraint: nothing is cut or dropped without being counted. The first token of a row has no
label: nothing predicts it, and in a packed sequence it would be predicted from another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finegraft.core.errors import ConfigError, DataError
from finegraft.data.conversation import Message
from finegraft.data.render import Rendered, render_batch
from finegraft.data.spans import Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
TRUNCATIONS = ("keep_start", "keep_end")
_CHUNK_ROWS = 1000


@dataclass(frozen=True)
class Counts:
    """What became of the rows.

    Attributes:
        rows: Rows kept.
        tokens: Tokens in the kept rows.
        trained_tokens: Tokens that carry a label.
        truncated: Rows longer than ``max_length``, dropped ones among them.
        dropped: Rows left out because nothing in them could be learnt.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Prepared:
    """Rows to train on. ``labels`` equal the ids where learnt and are -100 elsewhere."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    counts: Counts
    warnings: list[str]


def prepare(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completion_only: bool | None = None,
    truncation: str = "keep_start",
    tools: Sequence[Tools] | None = None,
    names: Sequence[str] | None = None,
) -> Prepared:
    """Render, cut and label conversations.

    Args:
        conversations: One list of messages per row.
        tokenizer: As in ``render``.
        max_length: Longest row, in tokens.
        completion_only: As in ``render``.
        truncation: ``keep_start`` cuts the end of a long row, ``keep_end`` its start.
        tools: JSON schemas of tools for each row, from ``rows.tools_of``.
        names: What messages call each row; None: ``row N``, 1-based.

    Returns:
        The rows with counts and, in plain words, what was cut or dropped.

    Raises:
        ConfigError: FG-DATA-013, ``max_length`` below 2 or an unknown ``truncation``.
        DataError: FG-DATA-009 nothing is left to learn; those of ``render`` with the row number.
    """
    _check(max_length, truncation)
    kept_ids, kept_labels = [], []
    truncated, longest = 0, 0
    for start in range(0, len(conversations), _CHUNK_ROWS):
        for row in _rendered(conversations, tokenizer, completion_only, tools, start, names):
            longest = max(longest, len(row.input_ids))
            truncated += len(row.input_ids) > max_length
            ids, labels = _cut(row, max_length, truncation)
            if any(label != IGNORE for label in labels):
                kept_ids.append(ids)
                kept_labels.append(labels)
    counts = Counts(
        rows=len(kept_ids),
        tokens=sum(map(len, kept_ids)),
        trained_tokens=sum(label != IGNORE for labels in kept_labels for label in labels),
        truncated=truncated,
        dropped=len(conversations) - len(kept_ids),
    )
    if not kept_ids:
        raise _nothing_left(len(conversations), truncated, longest, max_length)
    warnings = _warnings(counts, len(conversations), longest, max_length)
    return Prepared(kept_ids, kept_labels, counts, warnings)


def _check(max_length: int, truncation: str) -> None:
    if max_length < 2:
        raise ConfigError(
            "FG-DATA-013",
            f"max_length is {max_length}",
            allowed="2 or more tokens",
            fix="max_length=1024",
        )
    if truncation not in TRUNCATIONS:
        raise ConfigError(
            "FG-DATA-013",
            f"truncation is {truncation!r}",
            allowed=", ".join(TRUNCATIONS),
            fix='truncation="keep_start"',
        )


def _rendered(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    completion_only: bool | None,
    tools: Sequence[Tools] | None,
    start: int,
    names: Sequence[str] | None,
) -> list[Rendered]:
    stop = min(start + _CHUNK_ROWS, len(conversations))
    return render_batch(
        conversations[start:stop],
        tokenizer,
        completion_only=completion_only,
        tools=tools[start:stop] if tools is not None else None,
        names=names[start:stop]
        if names is not None
        else [f"row {number}" for number in range(start + 1, stop + 1)],
    )


def _cut(row: Rendered, max_length: int, truncation: str) -> tuple[list[int], list[int]]:
    window = slice(0, max_length) if truncation == "keep_start" else slice(-max_length, None)
    ids, trained = row.input_ids[window], row.trained[window]
    labels = [i if learnt else IGNORE for i, learnt in zip(ids, trained, strict=True)]
    if labels:
        labels[0] = IGNORE
    return ids, labels


def _rows(number: int, total: int) -> tuple[str, str]:
    """``3 of 660 rows`` and the verb that goes with it."""
    return f"{number} of {total} rows", "was" if number == 1 else "were"


def _warnings(counts: Counts, total: int, longest: int, max_length: int) -> list[str]:
    warnings = []
    if counts.truncated:
        who, verb = _rows(counts.truncated, total)
        warnings.append(
            f"{who} {verb} longer than {max_length} tokens and {verb} cut; "
            f"the longest has {longest}: set max_length={longest}"
        )
    if counts.dropped:
        who, verb = _rows(counts.dropped, total)
        warnings.append(
            f"{who} {verb} left out because nothing in {max_length} tokens is an answer to learn"
        )
    return warnings


def _nothing_left(total: int, truncated: int, longest: int, max_length: int) -> DataError:
    if truncated:
        return DataError(
            "FG-DATA-009",
            f"nothing is left to learn: within {max_length} tokens none of {total} rows reaches "
            "its answer",
            allowed=f"the longest row has {longest} tokens",
            fix=f"max_length={longest}",
        )
    return DataError(
        "FG-DATA-009",
        f"nothing is left to learn: none of {total} rows holds an answer",
        allowed="rows with at least one assistant message",
        fix="completion_only_loss=False learns every token instead",
    )
