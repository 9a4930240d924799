"""Classification: texts in, one label, several labels or a value out.

What: rows with a text (or a pair) and a label train a model with a classification head, encoder or
decoder. How: ``check`` finds columns and labels, holds out a share of every class and makes the
ids, before any weight is loaded; ``build`` opens the model with these labels and makes the trainer,
which evaluates each epoch and keeps the best one. Constraint: no text is on both sides. Trade-off:
without held-out rows the last epoch is kept, because nothing can say which is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, EarlyStoppingCallback

from finegraft import adapters, opening
from finegraft.core.errors import ConfigError, DataError, did_you_mean
from finegraft.core.schema import TrainConfig
from finegraft.data import held_out, labels
from finegraft.data.labels import Examples, Labels
from finegraft.data.mix import read_rows
from finegraft.data.sources import describe, fingerprint
from finegraft.models import classifier, load
from finegraft.models.locate import Located, locate
from finegraft.training import data_check
from finegraft.training.arguments import TrainingArguments
from finegraft.training.classifier import ClassifierTrainer, Measure, SaveOften, loss_of
from finegraft.training.events import EventLog
from finegraft.training.metrics import CHOICES
from finegraft.training.tasks._contract import (
    Task,
    adapted,
    evaluation_arguments,
    quantization,
    shared_arguments,
)


@dataclass(frozen=True)
class _Data:
    """Checked rows as ids, and ``sides``: the examples they are, trained and held out."""

    train: Dataset
    held_out: Dataset | None
    labels: Labels
    weights: list[float] | None
    metric: str
    record: dict[str, Any]
    tokenizer: Any
    sides: tuple[Examples, Examples | None]


def check(config: TrainConfig, log: EventLog) -> _Data:
    """Read the rows, find their labels, split them; the weights are not loaded for it.

    Raises:
        DataError: FG-CLASS-002 to FG-CLASS-011; ConfigError: FG-CLASS-016, a measure that this
            problem does not have; FG-CLASS-017, settings that need held-out rows or classes.
    """
    rows = read_rows(config.data, config.map)
    which = labels.columns(
        rows,
        text=config.text_column,
        pair=config.text_pair_column,
        label=config.label_column,
    )
    examples = labels.read(rows, which, describe(config.data))
    located = locate(config.model, revision=config.revision)
    found = labels.make(examples, config.problem_type, given_names(config))
    names = _in_order_of_model(found, located, config.trust_remote_code)
    train, held, warnings = _sides(config, examples, names, which)
    guessed = {"text": which.text, "pair": which.pair, "label": which.label}
    looked = data_check.look(config, len(rows), task="classification", columns=guessed)
    metric = chosen(config, names.problem_type, CHOICES[names.problem_type], held is not None)
    tokenizer = opening.open_text_tokenizer(
        located,
        max_seq_length=config.max_length,
        truncation_side=config.truncation_side,
        trust_remote_code=config.trust_remote_code,
    )
    encoded = names.encode(train)
    inputs, cut = _tokenized(tokenizer, train)
    held_inputs, held_cut = _tokenized(tokenizer, held) if held else ({}, 0)
    cut += held_cut
    if cut:
        warnings.append(
            f"{cut:,} texts are longer than {tokenizer.model_max_length:,} tokens; their "
            f"{'beginning' if config.truncation_side == 'left' else 'end'} is cut off"
        )
    counts = {
        "rows": len(train),
        "tokens": sum(map(len, inputs["input_ids"])),
        "truncated": cut,
        "held_out": len(held) if held else 0,
    }
    warnings += looked.lines
    told = {
        "format": " + ".join(filter(None, (which.text, which.pair))) + f" -> {which.label}",
        "problem_type": names.problem_type,
        "labels": names.counts(encoded),
        "warnings": warnings,
    }
    log.emit("data", **told, **counts)
    record = {
        "path": describe(config.data),
        "fingerprint": fingerprint(config.data),
        "counts": counts,
        "audit": looked.record,
    }
    weights = _weights(config, encoded, names)
    return _Data(
        Dataset.from_dict({**inputs, "labels": encoded}),
        Dataset.from_dict({**held_inputs, "labels": names.encode(held)}) if held else None,
        names,
        weights,
        metric,
        {**record, **told, "class_names": list(names.names)},
        tokenizer,
        (train, held),
    )


def given_names(config: TrainConfig) -> list[str] | None:
    """``class_names`` of the configuration as a list."""
    if config.class_names is None:
        return None
    return [name.strip() for name in config.class_names.split(",") if name.strip()]


def _in_order_of_model(found: Labels, located: Located, trust_remote_code: bool) -> Labels:
    """Labels in the order of a classifier that is trained further, so that its head keeps them.

    Raises:
        DataError: FG-CLASS-011, an adapter whose head has other labels.
    """
    if located.kind == "adapter":
        saved = opening.saved_labels(located).get("id2label", {})
    elif classifier.kind_of(located) == classifier.SEQUENCE:
        saved = load.load_config(located.path, trust_remote_code=trust_remote_code).id2label
    else:
        return found
    names = tuple(str(saved[i]) for i in sorted(saved))
    if set(names) == set(found.names) or (located.kind == "adapter" and found.count == 1):
        return Labels(found.problem_type, names if found.names else (), found.by_number)
    if located.kind == "adapter" and set(found.names) <= {str(i) for i in range(len(names))}:
        return Labels(found.problem_type, names, by_number=True)
    if located.kind == "adapter" and not set(found.names) <= set(names):
        raise DataError(
            "FG-CLASS-011",
            f"the rows have the labels {', '.join(found.names[:20])}, and the adapter "
            f"{located.name} was trained with {', '.join(names[:20])}",
            allowed="the labels that the adapter has",
            fix="correct the rows, or start from the base model to train a new head",
        )
    return Labels(found.problem_type, names) if located.kind == "adapter" else found


def _sides(
    config: TrainConfig, examples: Examples, names: Labels, which: labels.Columns
) -> tuple[Examples, Examples | None, list[str]]:
    """Examples to train on, examples held out, and what to warn of."""
    warnings: list[str] = []
    if config.eval_data:
        rows = read_rows(config.eval_data, config.map)
        held = labels.read(rows, which, describe(config.eval_data))
        names.encode(held)
        kept = held_out.unseen(examples, held)
        if len(kept) < len(examples):
            warnings.append(
                f"{len(examples) - len(kept):,} training rows are not used, because their text is "
                "among the held-out ones"
            )
        return not_empty(examples.select(kept)), held, warnings
    if not config.eval_fraction:
        return examples, None, ["no rows are held out, so nothing says how good the result is"]
    encoded = names.encode(examples)
    parts = held_out.split(examples, encoded, config.eval_fraction, config.seed)
    if parts.repeated:
        warnings.append(
            f"{parts.repeated:,} texts stand there more than once; each is on one side only"
        )
    if parts.contradictory:
        warnings.append(f"{parts.contradictory:,} texts stand there with different labels")
    if names.problem_type == labels.CLASSES and parts.only_trained:
        alone = ", ".join(f"'{names.names[int(str(i))]}'" for i in parts.only_trained[:8])
        warnings.append(
            f"a class with one text cannot be split, it is trained and not evaluated: {alone}"
        )
    train = not_empty(examples.select(parts.train))
    return train, examples.select(parts.held) if parts.held else None, warnings


def not_empty(train: Examples) -> Examples:
    """Raises DataError FG-CLASS-018 when the held-out rows leave nothing to train on."""
    if not len(train):
        raise DataError(
            "FG-CLASS-018",
            "no rows are left to train on: the text of each is among the held-out ones",
            allowed="held-out rows that are other texts",
            fix="pass another --eval-data, or none and --eval-fraction 0.2",
        )
    return train


def chosen(config: TrainConfig, what: str, choices: dict[str, bool], has_eval: bool) -> str:
    """The measure that chooses the best epoch.

    Args:
        what: The problem, for the message.
        choices: Whether more is better, by measure, the default first.

    Raises:
        ConfigError: FG-CLASS-016, another measure; FG-CLASS-017, none without held-out rows.
    """
    metric = config.metric_for_best_model or next(iter(choices))
    metric = metric.removeprefix("eval_")
    if metric not in choices:
        raise ConfigError(
            "FG-CLASS-016",
            f"metric_for_best_model is '{metric}', for {what}",
            allowed=", ".join(choices),
            fix=did_you_mean(metric, choices),
        )
    if not has_eval and (config.early_stopping_patience or config.metric_for_best_model):
        raise ConfigError(
            "FG-CLASS-017",
            "early_stopping_patience or metric_for_best_model is set, and no rows are held out",
            allowed="held-out rows, to see which epoch is the best",
            fix="--eval-fraction 0.2, or --eval-data FILE",
        )
    return metric


def _weights(config: TrainConfig, encoded: list[Any], names: Labels) -> list[float] | None:
    if config.class_weights == "none":
        return None
    if names.problem_type == labels.VALUES:
        raise ConfigError(
            "FG-CLASS-017",
            "class_weights is balanced, and values have no classes",
            allowed="none, for regression",
            fix="--class-weights none",
        )
    return held_out.class_weights(encoded, names.count)


def _tokenized(tokenizer: Any, examples: Examples) -> tuple[dict[str, Any], int]:
    """Columns for the model, and how many texts were cut."""
    made = tokenizer(examples.texts, examples.pairs, truncation=True)
    cut = sum(bool(one.overflowing) for one in made.encodings or ())
    return dict(made), cut


def build(config: TrainConfig, data: _Data) -> ClassifierTrainer:
    """Open the model with the labels of the rows, attach the method, make the trainer."""
    names = data.labels.names
    opened = opening.open_model(
        config.model,
        revision=config.revision,
        trainable=True,
        trust_remote_code=config.trust_remote_code,
        tokenizer=data.tokenizer,
        dtype=config.dtype,
        **quantization(config),
        task=classifier.SEQUENCE,
        **classifier.label_settings(
            data.labels.count, names or None, problem_type=data.labels.problem_type
        ),
    )
    model = adapted(
        config, opened.model, adapters.SEQUENCE, has_adapter=opened.located.kind == "adapter"
    )
    trainer = ClassifierTrainer(
        model=model,
        args=arguments(config, data.held_out is not None, data.metric),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=data.tokenizer,
        data_collator=DataCollatorWithPadding(data.tokenizer, pad_to_multiple_of=8),
        compute_metrics=Measure(data.labels.problem_type, list(names)),
        compute_loss_func=loss_of(data.labels.problem_type, data.weights),
        callbacks=callbacks(config),
    )
    return trainer


def arguments(
    config: TrainConfig, has_eval: bool, metric: str, choices: dict[str, bool] | None = None
) -> TrainingArguments:
    """Settings of a trainer that keeps the best evaluation.

    Args:
        metric: Measure that chooses it.
        choices: Whether more is better, by measure; None: of every problem of this task.
    """
    values = {
        **shared_arguments(config, TrainingArguments),
        **evaluation_arguments(config, has_eval),
        "metric_for_best_model": None,
    }
    if has_eval:
        known = choices or {name: up for table in CHOICES.values() for name, up in table.items()}
        values |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": metric,
            "greater_is_better": known[metric],
            "save_strategy": values["eval_strategy"],
            "save_steps": config.eval_steps or config.save_steps,
        }
    return TrainingArguments(**values)


def callbacks(config: TrainConfig) -> Sequence[Any]:
    """Saves between evaluations, and the early end if one is configured."""
    early = config.early_stopping_patience
    return [SaveOften(config.save_steps), *([EarlyStoppingCallback(early)] if early else [])]


TASK = Task(check=check, build=build)
