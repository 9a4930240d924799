"""Token classification: spans of a text (names, places, times, numbers) with their types.

What: rows of marked texts train a head that gives every word a tag. How: ``check`` turns any layout
into tags of tokens before any weight is loaded; ``build`` opens the model with these tags and makes
the trainer, which evaluates each epoch by the F1 of whole spans and keeps the best one. Constraint:
no text is on both sides. Trade-off: a text longer than the model is cut in training, and read in
windows in prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForTokenClassification

from finegraft import adapters, opening
from finegraft.core.errors import ConfigError, DataError
from finegraft.core.schema import TrainConfig
from finegraft.data import held_out, marked, tags
from finegraft.data.labels import Examples
from finegraft.data.sources import describe, fingerprint
from finegraft.models import classifier, load
from finegraft.models.locate import Located, locate
from finegraft.training import data_check
from finegraft.training.classifier import ClassifierTrainer
from finegraft.training.entities import CHOICES, Measure, likeliest, loss_of
from finegraft.training.events import EventLog
from finegraft.training.tasks._contract import Task, adapted, quantization
from finegraft.training.tasks.classification import (
    arguments,
    callbacks,
    chosen,
    given_names,
    not_empty,
)

_SHOWN = 8  # row numbers in one message


@dataclass(frozen=True)
class _Data:
    """Checked rows as ids, and ``sides``: the examples they are, trained and held out."""

    train: Dataset
    held_out: Dataset | None
    names: tuple[str, ...]
    weights: list[float] | None
    metric: str
    record: dict[str, Any]
    tokenizer: Any
    sides: tuple[Examples, Examples | None]


@dataclass(frozen=True)
class _Encoded:
    """Columns for the model, texts that were cut, rows with spans that end inside a word."""

    columns: dict[str, Any]
    cut: int
    odd: list[int]

    def dataset(self) -> Dataset:
        return Dataset.from_dict(self.columns)


def check(config: TrainConfig, log: EventLog) -> _Data:
    """Read the rows, find their types, split them; the weights are not loaded for it.

    Raises:
        DataError: FG-CLASS-004, FG-CLASS-018, FG-CLASS-031 to FG-CLASS-041; ConfigError:
            FG-CLASS-016, FG-CLASS-017, FG-CLASS-030, settings that this task does not have.
    """
    _require_own(config)
    given = given_names(config)
    rows = marked.read_rows(config.data, config.map)
    which = marked.columns(rows, config.text_column, config.label_column)
    examples = marked.read(rows, which, describe(config.data), given)
    located = locate(config.model, revision=config.revision)
    names = _in_order_of_model(tags.names_for(examples, given), located, config.trust_remote_code)
    train, held, warnings = _sides(config, examples, names, given)
    looked = data_check.look(config, len(rows), texts=examples.texts)
    metric = chosen(config, "token classification", CHOICES, held is not None)
    tokenizer = opening.open_text_tokenizer(
        located,
        max_seq_length=config.max_length,
        truncation_side=config.truncation_side,
        trust_remote_code=config.trust_remote_code,
    )
    encoded = _encode(tokenizer, train, names)
    held_encoded = _encode(tokenizer, held, names) if held else None
    cut = encoded.cut + (held_encoded.cut if held_encoded else 0)
    warnings += _told(encoded, train.source)
    warnings += _told(held_encoded, held.source) if held and held_encoded else []
    if cut:
        warnings.append(
            f"{cut:,} texts are longer than {tokenizer.model_max_length:,} tokens; their "
            f"{'beginning' if config.truncation_side == 'left' else 'end'} is cut off, with what "
            "is marked there"
        )
    warnings += looked.lines
    counts = {
        "rows": len(train),
        "tokens": sum(map(len, encoded.columns["input_ids"])),
        "truncated": cut,
        "held_out": len(held) if held else 0,
    }
    told = {
        "format": f"{which.text} -> {which.label}",
        "labels": tags.counts(train),
        "warnings": warnings,
    }
    log.emit("data", **told, **counts)
    record = {
        "path": describe(config.data),
        "fingerprint": fingerprint(config.data),
        "counts": counts,
        "audit": looked.record,
    }
    return _Data(
        encoded.dataset(),
        held_encoded.dataset() if held_encoded else None,
        names,
        _weights(config, encoded, names),
        metric,
        {**record, **told, "class_names": list(names)},
        tokenizer,
        (train, held),
    )


def _require_own(config: TrainConfig) -> None:
    """Raises ConfigError FG-CLASS-030 for settings of whole texts, which would be ignored."""
    for key in ("text_pair_column", "problem_type"):
        if getattr(config, key) is not None:
            raise ConfigError(
                "FG-CLASS-030",
                f"{key} with task 'token_classification', which would ignore it",
                allowed="one text a row, and one tag a word",
                fix=f"remove {key}, or --task classification to label whole texts",
            )


def _in_order_of_model(
    found: tuple[str, ...], located: Located, trust_remote_code: bool
) -> tuple[str, ...]:
    """Tags in the order of a model that is trained further, so that its head keeps them.

    Raises:
        DataError: FG-CLASS-041, an adapter whose head lacks some.
    """
    if located.kind == "adapter":
        saved = opening.saved_labels(located).get("id2label", {})
    elif classifier.kind_of(located) == classifier.TOKEN:
        saved = load.load_config(located.path, trust_remote_code=trust_remote_code).id2label
    else:
        return found
    names = tuple(str(saved[i]) for i in sorted(saved))
    if set(found) <= set(names):
        return names
    if located.kind == "adapter":
        raise DataError(
            "FG-CLASS-041",
            f"the rows need the tags {', '.join(found[:20])}, and the adapter {located.name} was "
            f"trained with {', '.join(names[:20])}",
            allowed="the types that the adapter has",
            fix="correct the rows, or start from the base model to train a new head",
        )
    return found


def _sides(
    config: TrainConfig, examples: Examples, names: Sequence[str], given: list[str] | None
) -> tuple[Examples, Examples | None, list[str]]:
    """Examples to train on, examples held out, and what to warn of."""
    if config.eval_data:
        rows = marked.read_rows(config.eval_data, config.map)
        which = marked.columns(rows, config.text_column, config.label_column)
        held = marked.read(rows, which, describe(config.eval_data), given)
        tags.require_known(held, names)
        kept = held_out.unseen(examples, held)
        left = len(examples) - len(kept)
        warnings = [
            f"{left:,} training rows are not used, because their text is among the held-out ones"
        ]
        return not_empty(examples.select(kept)), held, warnings if left else []
    if not config.eval_fraction:
        return examples, None, ["no rows are held out, so nothing says how good the result is"]
    kinds = sorted(tags.counts(examples))
    present = [
        [float(any(span.label == kind for span in spans)) for kind in kinds]
        for spans in examples.labels
    ]
    parts = held_out.split(examples, present, config.eval_fraction, config.seed)
    warnings = []
    if parts.repeated:
        warnings.append(
            f"{parts.repeated:,} texts stand there more than once; each is on one side only"
        )
    held_rows = examples.select(parts.held) if parts.held else None
    return not_empty(examples.select(parts.train)), held_rows, warnings


def _encode(tokenizer: Any, examples: Examples, names: Sequence[str]) -> _Encoded:
    """Ids and tags of every row.

    Raises:
        ConfigError: FG-CLASS-040, a tokenizer that does not say where its tokens stand.
        DataError: FG-CLASS-036, most spans end inside a word.
    """
    tags.require_offsets(tokenizer)
    made = tokenizer(examples.texts, truncation=True, return_offsets_mapping=True)
    columns = dict(made)
    offsets = columns.pop("offset_mapping")
    ids = {name: i for i, name in enumerate(names)}
    marks, odd_rows, odd = [], [], 0
    for i, spans in enumerate(examples.labels):
        seen = tags.words(examples.texts[i], offsets[i])
        row, wrong = tags.encode(spans, seen, ids, len(offsets[i]))
        marks.append(row)
        odd += wrong
        if wrong:
            odd_rows.append(examples.numbers[i])
    spans_there = sum(map(len, examples.labels))
    if odd * 2 > spans_there:
        raise DataError(
            "FG-CLASS-036",
            f"{examples.source}: {odd:,} of {spans_there:,} spans do not begin and end with a "
            f"word, first in row {odd_rows[0]}",
            allowed="start and end in characters of the text, counted from 0, end not included",
            fix="correct start and end; counted in bytes or in words they are others",
        )
    cut = sum(bool(one.overflowing) for one in made.encodings or ())
    return _Encoded({**columns, "labels": marks}, cut, odd_rows)


def _told(encoded: _Encoded, source: str) -> list[str]:
    """The warning about spans that cannot be learnt."""
    if not encoded.odd:
        return []
    rows = ", ".join(map(str, encoded.odd[:_SHOWN]))
    more = f" and {len(encoded.odd) - _SHOWN:,} more" if len(encoded.odd) > _SHOWN else ""
    return [
        f"{source}: spans that begin or end inside a word are left out, their words are neither "
        f"trained nor counted: row {rows}{more}"
    ]


def _weights(config: TrainConfig, encoded: _Encoded, names: Sequence[str]) -> list[float] | None:
    if config.class_weights == "none":
        return None
    ids = [i for row in encoded.columns["labels"] for i in row if i != tags.IGNORED]
    return held_out.class_weights(ids, len(names))


def build(config: TrainConfig, data: _Data) -> ClassifierTrainer:
    """Open the model with the tags of the rows, attach the method, make the trainer."""
    opened = opening.open_model(
        config.model,
        revision=config.revision,
        trainable=True,
        trust_remote_code=config.trust_remote_code,
        tokenizer=data.tokenizer,
        dtype=config.dtype,
        **quantization(config),
        task=classifier.TOKEN,
        **classifier.label_settings(id2label=data.names),
    )
    model = adapted(
        config, opened.model, adapters.TOKEN, has_adapter=opened.located.kind == "adapter"
    )
    return ClassifierTrainer(
        model=model,
        args=arguments(config, data.held_out is not None, data.metric, CHOICES),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=data.tokenizer,
        data_collator=DataCollatorForTokenClassification(data.tokenizer, pad_to_multiple_of=8),
        compute_metrics=Measure(data.names),
        compute_loss_func=loss_of(data.weights),
        preprocess_logits_for_metrics=likeliest,
        callbacks=callbacks(config),
    )


TASK = Task(check=check, build=build)
