"""A pad token that is not the end token, and a model that agrees.

What: ``prepare`` picks the padding token and the length, ``agree`` tells the model. How: an
existing token that nothing else uses; the vocabulary never grows here. Constraint: masking labels
by a pad id that is also the end id teaches a model never to stop, so the two are kept apart where
the vocabulary allows it. Trade-off: where it does not (GPT-2), pad stays equal to eos, the
tokenizer carries ``pad_is_eos = True``, and masks must come from lengths: finegraft's always do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from finegraft.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Made for padding first, then tokens that text never contains.
_PAD_LIKE = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
    "[UNK]",
    "<|reserved_special_token_0|>",
)


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list | tuple) else {int(value)}


def _choose(tokenizer: PreTrainedTokenizerBase, ends: set[int], rows: int | None) -> str | None:
    vocab = tokenizer.get_vocab()
    for token in (*_PAD_LIKE, tokenizer.unk_token):
        index = vocab.get(token)
        if index is not None and index not in ends and (rows is None or index < rows):
            return token
    return None


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig | None,
    max_seq_length: int | None,
    padding_side: Literal["left", "right"] = "right",
) -> PreTrainedTokenizerBase:
    """Set pad token, padding side and length, and return the same tokenizer.

    Args:
        tokenizer: Changed in place; no token is added.
        model_config: For the end ids and the number of embedding rows; None skips both.
        max_seq_length: In tokens; None leaves the tokenizer's own.
        padding_side: ``right`` to train, ``left`` to generate in batches.

    Returns:
        The tokenizer, with ``pad_is_eos`` set.

    Raises:
        ModelError: FG-MODEL-012, no token could serve as padding.
    """
    text = None if model_config is None else model_config.get_text_config()
    ends = _ids(tokenizer.eos_token_id) | _ids(getattr(text, "eos_token_id", None))
    pad = tokenizer.pad_token_id
    if pad is None or pad in ends:
        chosen = _choose(tokenizer, ends, getattr(text, "vocab_size", None))
        if chosen is None:
            chosen = tokenizer.pad_token or tokenizer.eos_token
        if chosen is None:
            raise ModelError(
                "FG-MODEL-012",
                "the tokenizer has neither a pad nor an end token, and none that could pad",
                allowed="a tokenizer with a pad, eos or unk token",
                fix="set tokenizer.pad_token to a token of its vocabulary and save it",
            )
        if chosen != tokenizer.pad_token:
            log.info("padding with %r (it was %r)", chosen, tokenizer.pad_token)
        tokenizer.pad_token = chosen
    tokenizer.pad_is_eos = tokenizer.pad_token_id in ends
    tokenizer.padding_side = padding_side
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    return tokenizer


def agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's configuration and generation settings the tokenizer's pad id.

    An end id is filled in only where the model has none: chat models list several, and the
    tokenizer knows one of them.

    Args:
        model: Changed in place: ``config`` and, if it has one, ``generation_config``.
        tokenizer: As ``prepare`` left it.
    """
    holders: list[Any] = [model.config, model.config.get_text_config()]
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        holders.append(generation)
    for holder in holders:
        holder.pad_token_id = tokenizer.pad_token_id
        if getattr(holder, "eos_token_id", None) is None and tokenizer.eos_token_id is not None:
            holder.eos_token_id = tokenizer.eos_token_id
