"""Settings for a file of rows, found by looking at it.

What: ``look`` finds task, layout and the columns to rename; ``propose`` measures the rows with a
tokenizer and chooses lengths, batch and epochs. How: one pass over the rows that keeps a sample of
them. Constraint: what is written has a reason that a person can read beside it. Trade-off: rules of
thumb, stated as such; they start a first run, and its held-out loss says what to change.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import DataError
from finegraft.data import labels, marked, sources
from finegraft.data import rows as layouts
from finegraft.data.render import render_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAUSAL, CLASSIFICATION, TAGGING = "causal", "classification", "token_classification"
_LOOKED_AT = 100  # rows that tell the layout
_SAMPLE = 2000  # rows whose tokens are counted
_LONG = 2048  # tokens; beyond this a few long rows are cut rather than paid for by all
_STEP_TOKENS = 4096  # in a micro-batch at the most
_BATCH_ROWS = {CAUSAL: 8, CLASSIFICATION: 16, TAGGING: 16}
_MOST_HELD_OUT = 1000  # rows; more make an evaluation slower and hardly surer
_FEWEST_SPLIT = 20  # rows; below, all of them are trained on
_EPOCHS = ((200, 5), (2000, 3), (20_000, 2))  # passes, for files of fewer rows than this
_SUGGESTED = re.compile(r"--map (\S+?)=(\S+)")


@dataclass(frozen=True)
class Found:
    """What the rows are.

    Attributes:
        layout: Name of the format, or the columns of text and label.
        map: Columns to rename, wanted to found.
        rows: How many there are.
        sample: Some of them, chosen evenly, renamed.
    """

    task: str
    layout: str
    map: dict[str, str]
    rows: int
    sample: list[dict[str, Any]]
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A key of the configuration with the reason for its value."""

    key: str
    value: Any
    reason: str


def look(spec: sources.Spec, task: str | None = None) -> Found:
    """Read the rows once and find out what they are.

    Args:
        spec: As in ``sources.parts``.
        task: Use this one instead of looking.

    Raises:
        ConfigError, DataError: those of reading; FG-DATA-007, FG-DATA-034 and FG-DATA-037, rows
            that no task here takes.
    """
    rows: Any = _rows_of(spec)
    head = list(itertools.islice(rows, _LOOKED_AT))
    found, layout, mapping, columns = _recognised(head, task)
    dice, count = random.Random(0), 0
    sample: list[dict[str, Any]] = []
    for count, row in enumerate(itertools.chain(head, rows), 1):  # a reservoir: all rows alike
        if len(sample) < _SAMPLE:
            sample.append(row)
        elif (place := dice.randrange(count)) < _SAMPLE:
            sample[place] = row
    return Found(found, layout, mapping, count, layouts.apply_map(sample, mapping), columns)


def _rows_of(spec: sources.Spec) -> Any:
    """Rows; a file of words and their tags as sentences."""
    files = [file for part in sources.parts(spec) for file in sources.files(part)]
    if all(isinstance(file, Path) and file.suffix in marked.WORD_FILES for file in files):
        return iter(marked.read_rows(spec))
    return sources.iter_rows(spec)


def _recognised(
    head: list[dict[str, Any]], task: str | None
) -> tuple[str, str, dict[str, str], dict[str, str]]:
    """Task, layout, map and column settings."""
    if task == TAGGING:
        return _tagged(head)
    if task == CLASSIFICATION:
        return _labelled(head)
    try:
        return CAUSAL, layouts.detect(head)[0], {}, {}
    except DataError as error:
        fix = error.fix or ""
        if error.code == "FG-DATA-035" and task is None:
            return _tagged(head) if TAGGING in fix else _labelled(head)
        if error.code != "FG-DATA-007":
            raise
        if task is None and _few_labels(head):
            return _labelled(head)
        mapping = dict(_SUGGESTED.findall(fix))
        if not mapping or any("<" in old for old in mapping.values()):
            raise
        return CAUSAL, layouts.detect(layouts.apply_map(head, mapping))[0], mapping, {}


def _few_labels(head: Sequence[dict[str, Any]]) -> bool:
    """Whether a column of labels is there that a few values fill."""
    try:
        which = labels.columns(head)
        values = {str(row.get(which.label)) for row in head}
    except DataError:
        return False
    return 1 < len(values) <= max(2, len(head) // 4) and max(map(len, values)) <= 40


def _labelled(head: list[dict[str, Any]]) -> tuple[str, str, dict[str, str], dict[str, str]]:
    which = labels.columns(head)
    columns = {"text_column": which.text, "label_column": which.label}
    if which.pair:
        columns["text_pair_column"] = which.pair
    told = " + ".join(filter(None, (which.text, which.pair))) + f" -> {which.label}"
    return CLASSIFICATION, told, {}, columns


def _tagged(head: list[dict[str, Any]]) -> tuple[str, str, dict[str, str], dict[str, str]]:
    which = marked.columns(head)
    columns = {"text_column": which.text, "label_column": which.label}
    return TAGGING, f"{which.text} -> {which.label}", {}, columns


def lengths(found: Found, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens in each row of the sample, ascending.

    Raises:
        DataError: rows that cannot be rendered, with their layout's codes.
    """
    if found.task == CAUSAL:
        _, layout = layouts.detect(found.sample)
        rendered = render_batch(
            layouts.conversations(found.sample, layout),
            tokenizer,
            tools=layouts.tools_of(found.sample),
        )
        return sorted(len(row.input_ids) for row in rendered)
    text, pair = found.columns["text_column"], found.columns.get("text_pair_column")
    joined = [
        " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for row in found.sample
        for value in [row.get(text)]
    ]
    others = [str(row.get(pair)) for row in found.sample] if pair else None
    ids = tokenizer(joined, others, truncation=False, verbose=False)["input_ids"]
    return sorted(map(len, ids))


def propose(found: Found, counted: Sequence[int], longest: int) -> list[Setting]:
    """Choose settings.

    Args:
        found: From ``look``.
        counted: From ``lengths``.
        longest: Tokens that the model takes.

    Returns:
        Settings in the order in which a person reads them.
    """
    length, why = _max_length(counted, longest, found.rows > len(found.sample))
    whole = _BATCH_ROWS[found.task]
    whole = whole if found.rows >= 10 * whole else max(1, 2 ** int(math.log2(found.rows / 10 or 1)))
    batch = max(1, min(whole, 2 ** int(math.log2(max(1, _STEP_TOKENS // length)))))
    epochs = next((passes for fewer, passes in _EPOCHS if found.rows < fewer), 1)
    held = 0.0 if found.rows < _FEWEST_SPLIT else (0.1 if found.task == CAUSAL else 0.2)
    if found.rows * held > _MOST_HELD_OUT:
        held = math.floor(1e6 * _MOST_HELD_OUT / found.rows) / 1e6
    steps = math.ceil(found.rows * (1 - held) / whole)
    told_held = (
        f"{round(found.rows * held):,} rows are held out to evaluate with"
        if held
        else f"none are held out of {found.rows} rows; name others in eval_data"
    )
    return [
        *(Setting(key, name, "found by its name") for key, name in found.columns.items()),
        Setting("max_length", length, why),
        Setting("eval_fraction", held, told_held),
        Setting("num_train_epochs", float(epochs), f"{steps * epochs:,} steps, {steps:,} an epoch"),
        Setting("per_device_train_batch_size", batch, "rows in memory at a time"),
        Setting(
            "gradient_accumulation_steps", max(1, whole // batch), f"{whole} rows a step in all"
        ),
    ]


def _max_length(counted: Sequence[int], longest: int, sampled: bool) -> tuple[int, str]:
    """The longest row, rounded up; or what 99% of the rows fit into where a few are far longer."""
    top = counted[-1]
    wanted, share = top, len(counted)
    if top > _LONG:
        wanted = max(_LONG, counted[min(len(counted) - 1, math.ceil(len(counted) * 0.99))])
    if sampled:
        wanted = math.ceil(wanted * 1.25)  # rows that were not looked at may be longer
    length = max(64, min(math.ceil(wanted / 64) * 64, longest // 8 * 8 or longest))
    share = sum(n <= length for n in counted)
    which = f"of {len(counted):,} rows looked at" if sampled else f"of {len(counted):,} rows"
    fitting = "all" if share == len(counted) else f"{share:,}"
    return length, f"{fitting} {which} fit; the median has {counted[len(counted) // 2]:,} tokens"
