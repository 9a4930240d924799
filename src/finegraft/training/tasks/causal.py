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
from finegraft.data import rows as layouts
from finegraft.data.chat_templates import get_chat_template
from finegraft.data.prepare import Prepared, prepare
from finegraft.data.sources import fingerprint, read_rows
from finegraft.models import tokens
from finegraft.models.locate import Located, locate
from finegraft.training.arguments import SFTConfig
from finegraft.training.dataset import Rendering, columns
from finegraft.training.events import EventLog
from finegraft.training.sft import SFTTrainer, require_packable
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


def check(config: TrainConfig, log: EventLog) -> _Data:
    """Read, recognise and render the rows; the weights are not loaded for it.

    Raises:
        AdapterError: FG-ADAPT-030, packing with a method that cannot.
    """
    if config.packing:
        require_packable(adapters.find(config.method)[0])
    rows = layouts.apply_map(read_rows(config.data), config.map)
    name, layout = layouts.detect(rows)
    conversations, tools = layouts.conversations(rows, layout), layouts.tools_of(rows)
    held_rows: list[Any] = []
    if config.eval_data:
        held_rows = layouts.apply_map(read_rows(config.eval_data), config.map)
        _, held_layout = layouts.detect(held_rows)
        held = layouts.conversations(held_rows, held_layout)
    elif config.eval_fraction:
        size = max(1, round(len(conversations) * config.eval_fraction))
        held, conversations = conversations[-size:], conversations[:-size]
        tools = tools and tools[:-size]
    else:
        held = []
    tokenizer = _open_tokenizer(config)
    added = None
    if config.new_tokens:  # not special: answers are shown without special tokens
        added = tokens.extend(tokenizer, config.new_tokens, special_tokens=False)
    settings = {"max_length": config.max_length, "completion_only": config.completion_only_loss}
    prepared = prepare(conversations, tokenizer, tools=tools, **settings)
    held_out = prepare(held, tokenizer, **settings) if held else None
    record = {
        "path": config.data,
        "fingerprint": fingerprint(config.data),
        "format": name,
        "counts": asdict(prepared.counts),
        "eval_counts": asdict(held_out.counts) if held_out else None,
        "warnings": prepared.warnings,
    }
    log.emit("data", format=name, warnings=prepared.warnings, **asdict(prepared.counts))
    return _Data(prepared, held_out, record, tokenizer, added)


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
        train_dataset=_dataset(data.train, how),
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
