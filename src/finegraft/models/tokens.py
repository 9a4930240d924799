"""New tokens: a tokenizer and the embedding of its model grow together.

What: ``extend`` adds tokens to a tokenizer and notes how it split them before; ``grow`` gives the
model a row for each, in the input embedding and in the head, tied or not. How: rows that a padded
matrix has to spare are used first, the rest comes from transformers' own resizing; then the new
rows are filled in. Constraint: no row that was there is touched, nothing ever shrinks, and which
rows are new is kept on the model (``new_rows``), so that an adapter can train them alone.
Trade-off: the matrix grows to the exact size, not to a multiple of 64, so that plain
``resize_token_embeddings(len(tokenizer))`` gives the same shape.

Shapes: v rows of the vocabulary, k new rows, d hidden.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from finegraft.core.errors import AdapterError, ConfigError, did_you_mean
from finegraft.models import swap

logger = logging.getLogger(__name__)

Start = Literal["mean", "random", "interpolation"]
_NEW_ROWS = "finegraft_new_rows"  # on the model itself, so that a deep copy has it too


@dataclass(frozen=True)
class Added:
    """What ``extend`` did to a tokenizer.

    Attributes:
        tokens: New ones, in the order given.
        ids: Their ids.
        pieces: The ids that the tokenizer made of each before, for ``method="interpolation"``.
        known: Tokens asked for that were in the vocabulary already.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    known: tuple[str, ...]


def extend(tokenizer: Any, new_tokens: Sequence[str], special_tokens: bool = True) -> Added:
    """Add tokens to a tokenizer, in place; those it has are left alone, with one warning.

    Args:
        tokenizer: Of transformers.
        new_tokens: Not empty; a token given twice is added once.
        special_tokens: Whether ``decode(..., skip_special_tokens=True)`` drops them.

    Raises:
        ConfigError: FG-TOKEN-001 not a list of strings, FG-TOKEN-002 an empty list, FG-TOKEN-003 a
            token without a visible character.
    """
    wanted = list(dict.fromkeys(_checked(new_tokens)))
    vocabulary = tokenizer.get_vocab()
    known = tuple(token for token in wanted if token in vocabulary)
    tokens = tuple(token for token in wanted if token not in vocabulary)
    if known:
        logger.warning(
            "already in the vocabulary, not added again: %s", ", ".join(map(repr, known))
        )
    pieces = tuple(tuple(tokenizer.encode(t, add_special_tokens=False)) for t in tokens)
    if tokens:
        tokenizer.add_tokens(list(tokens), special_tokens=special_tokens)
    ids = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens)))
    return Added(tokens, ids, pieces, known)


def _checked(new_tokens: Any) -> list[str]:
    example = 'new_tokens=["<customer>", "<order>"]'
    odd = None
    if isinstance(new_tokens, str) or not isinstance(new_tokens, Sequence | set | frozenset):
        odd = f"new_tokens is {new_tokens!r}, a {type(new_tokens).__name__}"
    elif any(not isinstance(token, str) for token in new_tokens):
        wrong = next(token for token in new_tokens if not isinstance(token, str))
        odd = f"new_tokens holds {wrong!r}, a {type(wrong).__name__}"
    if odd:
        raise ConfigError("FG-TOKEN-001", odd, allowed="a list of strings", fix=f"pass {example}")
    if not new_tokens:
        raise ConfigError(
            "FG-TOKEN-002",
            "new_tokens is empty",
            allowed="at least one string",
            fix=f"pass {example}, or leave the call out",
        )
    blank = [token for token in new_tokens if not token.strip()]
    if blank:
        raise ConfigError(
            "FG-TOKEN-003",
            f"new_tokens holds {blank[0]!r}, which has no visible character",
            allowed="strings with at least one character that is not a space",
            fix="remove it from the list",
        )
    return list(new_tokens)


def check_start(method: str, interpolation: float) -> None:
    """Check how new rows are to start, before anything is changed.

    Raises:
        ConfigError: FG-TOKEN-004 an unknown method, FG-TOKEN-005 a share outside 0 to 1.
    """
    if method not in get_args(Start):
        raise ConfigError(
            "FG-TOKEN-004",
            f"method is {method!r}",
            allowed=", ".join(get_args(Start)),
            fix=did_you_mean(str(method), get_args(Start)),
        )
    if not 0.0 <= interpolation <= 1.0:
        raise ConfigError(
            "FG-TOKEN-005",
            f"interpolation is {interpolation}",
            allowed="0 (the mean of all rows) to 1 (the mean of the rows of the old pieces)",
            fix="pass interpolation=0.5",
        )


def check_growable(model: nn.Module) -> None:
    """Check that embedding and head can grow, before anything is changed.

    Raises:
        AdapterError: FG-TOKEN-006, the embedding or the head is none that can get more rows.
    """
    core = swap.core(model)
    layers = {"embedding": (_plain(_input(core)), nn.Embedding)}
    if _output(core) is not None:
        layers["head"] = (_plain(_output(core)), nn.Linear)
    for name, (layer, kind) in layers.items():
        if isinstance(layer, kind) and layer.weight.is_floating_point():
            continue
        raise AdapterError(
            "FG-TOKEN-006",
            f"the {name} of this {type(core).__name__} is a {type(layer).__name__}",
            allowed=f"a plain {kind.__name__} (new tokens come before an adapter on the {name})",
            fix="call add_new_tokens on the model as it was loaded, then get_peft_model",
        )


@torch.no_grad()
def grow(
    model: nn.Module,
    tokenizer: Any,
    added: Added,
    method: Start = "mean",
    interpolation: float = 0.5,
    seed: int = 3407,
) -> list[int]:
    """Give the model rows for what ``extend`` added; return the ids that are new on the model.

    Tokens that the tokenizer got elsewhere and the matrix has no row for are covered as well.

    Args:
        model: Changed in place; adapters may be attached.
        tokenizer: As ``extend`` left it.
        added: From ``extend``.
        method: ``mean`` of all rows that were there; ``random``, normal around that mean with the
            spread of each column; ``interpolation``, the mean blended with the rows of the pieces
            that the old tokenizer made of the token.
        interpolation: Share of the pieces in that blend, 0 to 1.
        seed: Of ``random``; the global random state is left alone.

    Raises:
        ConfigError: FG-TOKEN-004, FG-TOKEN-005; AdapterError: FG-TOKEN-006.
    """
    check_start(method, interpolation)
    check_growable(model)
    core = swap.core(model)
    rows = _plain(_input(core)).weight.shape[0]
    size = max([rows - 1, *tokenizer.get_vocab().values()]) + 1
    new = sorted({*added.ids, *range(rows, size)})
    if not new:
        return []
    resize(core, size)
    pieces = dict(zip(added.ids, added.pieces, strict=True))
    generator = torch.Generator().manual_seed(seed)
    for layer in _matrices(core):
        old = layer.weight[: new[0]]  # [v, d]: spare rows of a padded matrix are no words
        values = _starts(old, [pieces.get(i, ()) for i in new], method, interpolation, generator)
        layer.weight[torch.tensor(new, device=old.device)] = values.to(old.dtype)
        if getattr(layer, "bias", None) is not None:
            layer.bias[torch.tensor(new, device=old.device)] = layer.bias[: new[0]].mean()
    remember(core, new)
    return new


def _starts(
    old: torch.Tensor,
    pieces: Sequence[Sequence[int]],
    method: Start,
    interpolation: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """First values [k, d] of the new rows, in float32; no copy of ``old`` is made for them."""
    mean = old.mean(0, dtype=torch.float32)  # [d]
    values = mean.repeat(len(pieces), 1)
    if method == "random":
        norm = torch.linalg.vector_norm(old, dim=0, dtype=torch.float32)
        spread = (norm.square() / len(old) - mean.square()).clamp_min(0).sqrt()
        values += torch.randn(values.shape, generator=generator).to(values.device) * spread
    if method == "interpolation":
        for value, parts in zip(values, pieces, strict=True):
            inside = [part for part in parts if part < len(old)]
            if inside:
                value.lerp_(old[inside].mean(0, dtype=torch.float32), interpolation)
    return values


@torch.no_grad()
def resize(model: nn.Module, size: int) -> None:
    """Grow embedding, head and ``config.vocab_size`` to ``size`` rows; smaller sizes do nothing.

    New rows start as the mean of the old ones.
    """
    core = swap.core(model)
    with _unwrapped(core):
        before = core.get_input_embeddings().weight.shape[0]
        if size <= before:
            return
        with torch.random.fork_rng():  # it draws values, which are replaced below
            core.resize_token_embeddings(size, mean_resizing=False)
    for layer in _matrices(core):
        old = layer.weight[:before]
        layer.weight[before:] = old.mean(0, dtype=torch.float32).to(old.dtype)


@contextlib.contextmanager
def _unwrapped(core: Any) -> Iterator[None]:
    """The plain embedding and head in place of peft's wrappers that train some of their rows."""
    embedding, head = _input(core), _output(core)
    if embedding is not _plain(embedding):
        core.set_input_embeddings(_plain(embedding))
    if head is not None and head is not _plain(head):
        core.set_output_embeddings(_plain(head))
    try:
        yield
    finally:
        if embedding is not _plain(embedding):
            embedding.token_adapter.base_layer = core.get_input_embeddings()
            core.set_input_embeddings(embedding)
        if head is not None and head is not _plain(head):
            head.token_adapter.base_layer = core.get_output_embeddings()
            core.set_output_embeddings(head)


def _input(core: Any) -> Any:
    return core.get_input_embeddings()


def _output(core: Any) -> Any:
    return core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None


def _plain(layer: Any) -> Any:
    """The layer inside peft's wrapper that trains some of its rows, or the layer itself."""
    adapter = getattr(layer, "token_adapter", None)
    return layer if adapter is None else adapter.base_layer


def _matrices(core: Any) -> list[Any]:
    """Embedding, and the head where its weight is another."""
    embedding, head = _plain(_input(core)), _plain(_output(core))
    return [embedding] if head is None or is_tied(core) else [embedding, head]


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding are one matrix."""
    core = swap.core(model)
    head = _plain(_output(core))
    return head is not None and head.weight is _plain(_input(core)).weight


def remember(model: nn.Module, rows: Sequence[int]) -> None:
    """Keep on the model that these rows are new."""
    core = swap.core(model)
    setattr(core, _NEW_ROWS, sorted({*new_rows(core), *rows}))


def new_rows(model: nn.Module) -> list[int]:
    """Ids of the rows that were added to this model, ascending."""
    return list(getattr(swap.core(model), _NEW_ROWS, ()))
