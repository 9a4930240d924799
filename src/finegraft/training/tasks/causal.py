"""Causal language models: conversations in, the next token out.

What: rows of any known layout are rendered with the model's own chat template and trained with
``SFTTrainer``. How: ``check`` reads and renders before any weight is loaded, ``build`` opens the
model, attaches the configured method and makes the trainer. Constraint: which tokens are trained is
decided in ``data`` alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from finegraft import adapters, opening
from finegraft.core.schema import TrainConfig
from finegraft.data import mix
from finegraft.data.chat_templates import get_chat_template
from finegraft.data.mix import Corpus
from finegraft.data.prepare import Prepared, prepare
from finegraft.data.sources import describe, fingerprint
from finegraft.models import tokens
from finegraft.models.locate import Located, locate
from finegraft.training import data_check, stream_check
from finegraft.training.arguments import SFTConfig
from finegraft.training.dataset import Rendering, columns
from finegraft.training.events import EventLog
from finegraft.training.sft import SFTTrainer, require_packable
from finegraft.training.stream import Stream
from finegraft.training.tasks._contract import (
    Task,
    adapted,
    evaluation_arguments,
    quantization,
    shared_arguments,
)


@dataclass(frozen=True)
class _Data:
    """Checked rows, rendered."""

    train: Prepared
    held_out: Prepared | None
    record: dict[str, Any]
    tokenizer: Any
    added: tokens.Added | None
    stream: Stream | None = None  # then ``train`` is a sample of it


def sides(config: TrainConfig) -> tuple[str, Corpus, Corpus]:
    """Read the rows and hold some out, as the configuration says; needs no tokenizer.

    Returns:
        The name of the layout, what is trained on (each row as often as the weight of its file
        says) and what is held out, which may be empty.

    Raises:
        DataError: the codes of ``data.mix``.
    """
    every = mix.read(config.data, config.map, config.seed)
    if config.eval_data:
        train, held = every, mix.read(config.eval_data, config.map, config.seed)
    else:
        train, held = every.hold_out(config.eval_fraction)
    return every.format, train.repeated(), held


def check(config: TrainConfig, log: EventLog) -> _Data:
    """Read, recognise and render the rows; the weights are not loaded for it.

    Raises:
        AdapterError: FG-ADAPT-030, packing with a method that cannot.
    """
    if config.packing:
        require_packable(adapters.find(config.method)[0])
    if stream_check.wanted(config):
        return _check_stream(config, log)
    name, train, held = sides(config)
    looked = data_check.look(config, len(train.conversations))
    tokenizer, added = _extended_tokenizer(config)
    settings = {"max_length": config.max_length, "completion_only": config.completion_only_loss}
    prepared, held_out = (
        prepare(side.conversations, tokenizer, tools=side.tools, names=side.origins, **settings)
        if side
        else None
        for side in (train, held)
    )
    record = {
        "path": describe(config.data),
        "fingerprint": fingerprint(config.data),
        "format": name,
        "counts": asdict(prepared.counts),
        "eval_counts": asdict(held_out.counts) if held_out else None,
        "warnings": prepared.warnings,
        "audit": looked.record,
    }
    warnings = [*prepared.warnings, *looked.lines]
    log.emit("data", format=name, warnings=warnings, **asdict(prepared.counts))
    return _Data(prepared, held_out, record, tokenizer, added)


def _check_stream(config: TrainConfig, log: EventLog) -> _Data:
    """The same for rows that are read while training: a sample of them is looked at."""
    tokenizer, added = _extended_tokenizer(config)
    found = stream_check.check(config, tokenizer, log)
    return _Data(found.sample, found.held_out, found.record, tokenizer, added, found.stream)


def _extended_tokenizer(config: TrainConfig) -> tuple[Any, tokens.Added | None]:
    """The tokenizer with the configured new tokens."""
    tokenizer = _open_tokenizer(config)
    added = None
    if config.new_tokens:  # not special: answers are shown without special tokens
        added = tokens.extend(tokenizer, config.new_tokens, special_tokens=False)
    return tokenizer, added


def _open_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of the configured model, with the configured chat template."""
    located: Located = locate(config.model, revision=config.revision)
    tokenizer = opening.open_tokenizer(
        located, max_seq_length=config.max_length, trust_remote_code=config.trust_remote_code
    )
    if config.chat_template:
        tokenizer = get_chat_template(tokenizer, config.chat_template)
    return tokenizer


def build(config: TrainConfig, data: _Data) -> SFTTrainer:
    """Open the model, attach the method, make the trainer."""
    opened = opening.open_model(
        config.model,
        revision=config.revision,
        max_seq_length=config.max_length,
        trainable=True,
        trust_remote_code=config.trust_remote_code,
        tokenizer=data.tokenizer,
        dtype=config.dtype,
        **quantization(config),
    )
    if data.added:
        adapters.make_rows(opened.model, data.tokenizer, data.added)
    model = adapted(
        config, opened.model, adapters.CAUSAL, has_adapter=opened.located.kind == "adapter"
    )
    if config.packing:
        require_packable(adapters.method_of(model))
    how = Rendering(data.tokenizer, config.max_length, packing=config.packing)
    return SFTTrainer(
        model=model,
        args=_arguments(config, has_eval=data.held_out is not None),
        train_dataset=data.stream or _dataset(data.train, how),
        eval_dataset=_dataset(data.held_out, how) if data.held_out else None,
        processing_class=data.tokenizer,
    )


def _dataset(prepared: Any, how: Rendering) -> Dataset:
    return Dataset.from_dict(columns(prepared.input_ids, prepared.labels, how))


def _arguments(config: TrainConfig, has_eval: bool) -> SFTConfig:
    return SFTConfig(
        share_prefix=config.share_prefix,
        **shared_arguments(config, SFTConfig),
        **evaluation_arguments(config, has_eval),
    )


TASK = Task(check=check, build=build)
