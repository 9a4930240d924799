"""Whatever a trainer is given as rows, to ids and labels.

What: a ``datasets.Dataset`` (or list of rows, or stream) of any known layout, with or without a
``formatting_func``, becomes columns ``input_ids`` and ``labels``, and ``seq_lengths`` when packed.
How: the layout is found by ``data.rows``, ids and masks are made by ``data.prepare`` and nowhere
else. Constraint: rows that already carry ``input_ids`` are not rendered again, only cut and packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from finegraft.core.errors import DataError
from finegraft.data import rows as layouts
from finegraft.data.conversation import TEXT_ROLE, Message
from finegraft.data.pack import pack
from finegraft.data.prepare import Prepared, prepare

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset | list
_STREAM_BATCH_ROWS = 1000
_OWN_LAYOUT = {"messages", "completion"}  # these come before a text column, as in trl


@dataclass(frozen=True)
class Rendering:
    """How rows become ids: the settings that the trainer's arguments carry."""

    tokenizer: Any
    max_length: int
    completion_only: bool | None = None
    truncation: str = "keep_start"
    packing: bool = False
    text_field: str = "text"
    formatting_func: Callable[[Any], Any] | None = None


def encode(dataset: Rows, how: Rendering) -> Dataset | IterableDataset:
    """Return ``dataset`` with ids and labels.

    Raises:
        DataError: the codes of ``data.rows`` and ``data.prepare``; FG-DATA-020 for a
            ``formatting_func`` whose result cannot be used.
    """
    if isinstance(dataset, IterableDataset):
        return _encode_stream(dataset, how)
    if isinstance(dataset, list):
        dataset = Dataset.from_list(dataset)
    if "input_ids" in dataset.column_names:
        dataset = dataset if "labels" in dataset.column_names else dataset.map(_label_all)
        return _fitted(dataset, how)
    prepared = _prepare(list(dataset), how)
    for warning in prepared.warnings:
        logger.warning("%s", warning)
    return Dataset.from_dict(columns(prepared.input_ids, prepared.labels, how))


def _fitted(dataset: Dataset, how: Rendering) -> Dataset:
    """Rows of ids cut to the longest allowed, and packed when asked."""
    if "seq_lengths" in dataset.column_names:
        return dataset
    longer = sum(length > how.max_length for length in longest_rows(dataset, len(dataset)))
    if not longer and not how.packing:
        return dataset
    if longer:
        logger.warning(
            "%d of %d rows have more than max_length=%d tokens and are cut",
            longer,
            len(dataset),
            how.max_length,
        )
    end = slice(-how.max_length, None) if how.truncation == "keep_end" else slice(how.max_length)
    ids, labels = ([row[end] for row in dataset[name]] for name in ("input_ids", "labels"))
    return Dataset.from_dict(columns(ids, labels, how))


def longest_rows(dataset: Any, count: int) -> list[int]:
    """Lengths of the ``count`` longest rows, in tokens; empty for a stream that knows none."""
    if hasattr(dataset, "longest"):  # ``training.stream``
        return list(dataset.longest(count))
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return []
    lengths = pc.list_value_length(dataset.data.column("input_ids"))
    return sorted(lengths.to_pylist())[-count:]


def columns(ids: list[list[int]], labels: list[list[int]], how: Rendering) -> dict[str, list]:
    """Rows as columns, packed into sequences when asked."""
    if not how.packing:
        return {"input_ids": ids, "labels": labels}
    bins = pack([len(row) for row in ids], how.max_length)
    return {
        "input_ids": [_joined(ids, members) for members in bins],
        "labels": [_joined(labels, members) for members in bins],
        "seq_lengths": [[len(ids[i]) for i in members] for members in bins],
    }


def _joined(lists: list[list[int]], members: Iterable[int]) -> list[int]:
    return [value for i in members for value in lists[i]]


def _label_all(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"labels": list(row["input_ids"])}


def _encode_stream(dataset: IterableDataset, how: Rendering) -> IterableDataset:
    first = next(iter(dataset))
    if "input_ids" in first:
        return dataset if "labels" in first else dataset.map(_label_all)

    def convert(batch: dict[str, list]) -> dict[str, list]:
        names = list(batch)
        listed = [
            dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        prepared = _prepare(listed, how)
        return columns(prepared.input_ids, prepared.labels, how)

    return dataset.map(
        convert, batched=True, batch_size=_STREAM_BATCH_ROWS, remove_columns=list(first)
    )


def _prepare(rows: list[Mapping[str, Any]], how: Rendering) -> Prepared:
    tools = None
    if how.formatting_func is not None:
        conversations = formatted(rows, how.formatting_func)
    elif how.text_field in rows[0] and (how.text_field != "text" or not _OWN_LAYOUT & {*rows[0]}):
        # the text was made from the other columns, as notebooks do with Dataset.map
        _, layout = layouts.detect([{"text": rows[0][how.text_field]}], "text")
        conversations = layouts.conversations([{"text": r[how.text_field]} for r in rows], layout)
    else:
        _, layout = layouts.detect(rows)
        conversations = layouts.conversations(rows, layout)
        tools = layouts.tools_of(rows)
    return prepare(
        conversations,
        how.tokenizer,
        max_length=how.max_length,
        completion_only=how.completion_only,
        truncation=how.truncation,
        tools=tools,
    )


def formatted(rows: list[Mapping[str, Any]], function: Callable[[Any], Any]) -> list[list[Message]]:
    """Apply a ``formatting_func`` of either kind: row to string, or batch to list of strings.

    Trainers before 2025 called it with a dictionary of columns, later ones with one row. The first
    row tells which: a function for batches gives a list, or fails on values that are no lists.

    Raises:
        DataError: FG-DATA-020 when neither way gives one text a row.
    """
    try:
        probe = function(dict(rows[0]))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        probe = []
    if isinstance(probe, str) or _is_conversation(probe):
        results = [function(dict(row)) for row in rows]
    else:
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        results = function(batch)
        if isinstance(results, Mapping):
            results = results.get("text")
    if not isinstance(results, list) or len(results) != len(rows):
        got = len(results) if isinstance(results, list) else type(results).__name__
        raise DataError(
            "FG-DATA-020",
            f"formatting_func gave {got} for {len(rows)} rows",
            allowed="a string for one row, or a list with one string a row for a batch",
            fix="return one text for every row",
        )
    return [
        result if _is_conversation(result) else [{"role": TEXT_ROLE, "content": str(result)}]
        for result in results
    ]


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and "role" in part for part in value)
    )
