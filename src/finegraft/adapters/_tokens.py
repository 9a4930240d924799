"""Train the rows of new tokens beside any adapter, and nothing else of the embedding.

What: ``add_new_tokens``, and ``train_new_rows``, which gives an adapter the new rows of its model.
How: peft's own wrapper (``trainable_token_indices``) on the embedding, and on the head where it is
a matrix of its own, so that what is saved opens in plain peft; our class of its inner layer looks
rows up instead of copying the matrix in every call. Constraint: the matrix stays frozen, its rows
keep their bits, the trained rows are float32. Trade-off: peft's other configurations have no field
for the rows; they are written beside, which finegraft reads and plain peft does not.

Shapes: v rows of the matrix, k trained rows, d hidden.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import set_additional_trainable_modules
from torch import nn

from finegraft.core.errors import AdapterError
from finegraft.models import swap, tokens

logger = logging.getLogger(__name__)

_FIELD = "trainable_token_indices"  # of peft's LoraConfig, and in adapter_config.json
_CONFIG = "adapter_config.json"


def add_new_tokens(
    model: nn.Module,
    tokenizer: Any,
    new_tokens: Sequence[str],
    special_tokens: bool = True,
    verbose: bool = True,
    method: tokens.Start = "mean",
    interpolation: float = 0.5,
    random_state: int = 3407,
) -> tuple[nn.Module, Any]:
    """Add tokens to a tokenizer and rows for them to its model, before or after an adapter.

    Args:
        model: Of transformers or peft; changed in place. An adapter on it gets the new rows to
            train; without one, the next ``get_peft_model`` does.
        tokenizer: Changed in place.
        new_tokens: Strings; one that exists is reported and not added again.
        special_tokens: Special tokens are dropped by ``decode(..., skip_special_tokens=True)``,
            as chats do. False for what a reader shall see, an emoticon say.
        verbose: Report in one line: through ``logging`` where the program shows INFO, else on the
            error output.
        method: How new rows start: ``mean``, ``random`` or ``interpolation``.
        interpolation: Share of the token's old pieces in that start, 0 to 1.
        random_state: Seed of ``method="random"``.

    Returns:
        The same model and tokenizer.

    Raises:
        ConfigError: FG-TOKEN-001 to FG-TOKEN-005, a bad argument.
        AdapterError: FG-TOKEN-006 to FG-TOKEN-008, a model whose rows cannot grow or train.
    """
    tokens.check_start(method, interpolation)
    tokens.check_growable(model)
    added = tokens.extend(tokenizer, new_tokens, special_tokens)
    make_rows(model, tokenizer, added, method, interpolation, random_state)
    if verbose:
        _say(_summary(model, tokenizer, added))
    return model, tokenizer


def make_rows(model: nn.Module, tokenizer: Any, added: tokens.Added, *how: Any) -> None:
    """Rows for what ``tokens.extend`` added, trained by the adapter that the model carries."""
    tokens.grow(model, tokenizer, added, *how)
    train_new_rows(model)


def _summary(model: nn.Module, tokenizer: Any, added: tokens.Added) -> str:
    rows = swap.core(model).config.get_text_config().vocab_size
    return (
        f"{len(added.tokens)} new tokens, {len(added.known)} known already; "
        f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"
    )


def _say(line: str) -> None:
    """Log at INFO; where nobody set logging up to show that, write it to the error output."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
        return
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None)
    logging.StreamHandler(sys.stderr).handle(record)


def train_new_rows(model: nn.Module, adapter_name: str | None = None) -> int:
    """Let an adapter train the new rows of its model; return how many rows it trains.

    Nothing happens without new rows, without an adapter, or where the adapter trains the whole
    matrix (``modules_to_save``).

    Args:
        model: A peft model; any other is left alone.
        adapter_name: The active one by default.

    Raises:
        AdapterError: FG-TOKEN-007 peft cannot train rows of this head, FG-TOKEN-008 the embedding
            or the head carries another adapter.
    """
    rows = tokens.new_rows(model)
    if not rows or not isinstance(model, PeftModel):
        return 0
    name = adapter_name or model.active_adapters[0]
    core, config = swap.core(model), model.peft_config[name]
    trained = _by_layer(core, getattr(config, _FIELD, None))
    fresh: dict[str, list[int]] = {}
    for path, layer in _layers(core).items():
        if hasattr(layer, "modules_to_save") and name in layer.modules_to_save:
            continue
        inner = getattr(layer, "token_adapter", None)
        if inner is not None and name in inner.trainable_tokens_delta:
            trained[path] = _extend(inner, name, rows)
        else:
            _check_wrappable(core, path, layer)
            fresh[path] = trained[path] = rows
    if fresh:
        _wrap(core, config, name, fresh)
    setattr(config, _FIELD, trained or None)
    finish(model)
    return len(rows)


def _layers(core: Any) -> dict[str, Any]:
    """Paths and modules of the embedding and, where it is a matrix of its own, of the head.

    Raises:
        AdapterError: FG-TOKEN-007, FG-TOKEN-008.
    """
    embedding = core.get_input_embeddings()
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    shared = bool(core.config.to_dict().get("tie_word_embeddings"))  # what peft goes by
    problem = None
    if head is not None and getattr(getattr(head, "token_adapter", head), "bias", None) is not None:
        problem = "has a bias, which peft's rows would leave out"
    elif tokens.is_tied(core) and not shared:
        problem = "is the embedding's matrix, but config.tie_word_embeddings is False"
    if problem:
        raise AdapterError(
            "FG-TOKEN-007",
            f"the head of this {type(core).__name__} {problem}",
            allowed="a head without bias, tied as the configuration says",
            fix="train both matrices: modules_to_save=["
            f"'{_path(core, embedding)}', '{_path(core, head)}']",
        )
    if head is not None and shared and not hasattr(embedding, "modules_to_save"):
        _check_wrappable(core, _path(core, head), head)  # peft wraps it along with the embedding
    wanted = [embedding] if head is None or shared else [embedding, head]
    return {_path(core, layer): layer for layer in wanted}


def _path(core: nn.Module, module: Any) -> str:
    return next(name for name, found in core.named_modules() if found is module)


def _by_layer(core: Any, given: Any) -> dict[str, list[int]]:
    """The rows of a configuration by whole module paths, whichever of peft's forms they have."""
    if not given:
        return {}
    embedding = _path(core, core.get_input_embeddings())
    named = given if isinstance(given, dict) else {embedding: given}
    every = [name for name, _ in core.named_modules()]
    return {
        next((n for n in every if n == key or n.endswith("." + key)), key): list(rows)
        for key, rows in named.items()
    }


def _check_wrappable(core: nn.Module, path: str, layer: Any) -> None:
    """Raises AdapterError FG-TOKEN-008 where something else sits on the layer."""
    if hasattr(layer, "token_adapter") or isinstance(layer, nn.Embedding | nn.Linear):
        return
    raise AdapterError(
        "FG-TOKEN-008",
        f"{path}, whose new rows are to be trained, carries a {type(layer).__name__} already",
        allowed="an adapter that leaves the embedding and the head to the new tokens",
        fix=f"load the model again, with target_modules that leave {path.rsplit('.', 1)[-1]} out, "
        "or another method",
    )


def _wrap(core: Any, config: Any, name: str, rows: dict[str, list[int]]) -> None:
    """Put peft's wrappers on the layers; a tied head gets its own from peft."""
    wanted = copy.copy(config)
    setattr(wanted, _FIELD, rows)
    wanted.modules_to_save = None  # those are in place already
    wanted.inference_mode = False
    set_additional_trainable_modules(core, wanted, core.config.to_dict(), name)


@torch.no_grad()
def _extend(inner: Any, name: str, rows: Sequence[int]) -> list[int]:
    """Let a layer that trains some rows train these too; its tied twin shares what is changed."""
    have = inner.token_indices[name]
    missing = [row for row in rows if row not in have]
    if missing:
        start = inner.get_base_layer().weight[missing]
        delta, original = inner.trainable_tokens_delta[name], inner.trainable_tokens_original[name]
        together = torch.cat([delta, start.to(delta)])
        inner.trainable_tokens_delta[name] = nn.Parameter(together, delta.requires_grad)
        inner.trainable_tokens_original[name] = torch.cat([original, start.to(original)])
        inner.token_indices[name] = [*have, *missing]
    return list(inner.token_indices[name])


def finish(model: nn.Module) -> None:
    """Float32 rows, fast layers, and a ``save_pretrained`` that leaves the matrix out."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            for delta in module.trainable_tokens_delta.values():
                delta.data = delta.data.float() if delta.requires_grad else delta.data
    accelerate(model)
    if hasattr(model, "word_embeddings"):  # methods of virtual tokens keep the layer beside
        model.word_embeddings = swap.core(model).get_input_embeddings()
    if not isinstance(model, SavesNewRows):
        model.__class__ = _saving(type(model))


@functools.cache
def _saving(current: type[nn.Module]) -> type[nn.Module]:
    """The class of a peft model, stock or swapped already, with our ``save_pretrained``."""
    stock = getattr(current, "stock_class", current)
    body = {"stock_class": stock, "__module__": __name__}
    return type(f"Fast{stock.__name__}", (SavesNewRows, current), body)


class SavesNewRows:
    """Mixed into a peft model whose adapter trains new rows."""

    def save_pretrained(
        self: Any,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        **more: Any,
    ) -> None:
        """peft's, except that ``auto`` saves the trained rows and not the matrix they belong to."""
        if save_embedding_layers == "auto":
            save_embedding_layers = False  # peft's own answer after a resizing is to save all
        super().save_pretrained(  # type: ignore[misc]
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            **more,
        )
        for name in selected_adapters or self.peft_config:
            folder = Path(save_directory) / ("" if name == "default" else name)
            _note_rows(folder / _CONFIG, getattr(self.peft_config[name], _FIELD, None))


def _note_rows(file: Path, rows: Any) -> None:
    """Write the rows into a configuration whose class has no field for them."""
    if not rows or not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    if not values.get(_FIELD):
        text = json.dumps({**values, _FIELD: rows}, indent=2, sort_keys=True)
        file.write_text(text, encoding="utf-8")


def saved_config(folder: Path) -> PeftConfig | None:
    """The configuration of a saved adapter that trains rows, None for any other adapter."""
    try:
        values = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # peft says what is wrong with it
    rows = values.pop(_FIELD, None) if isinstance(values, dict) else None
    if not rows:
        return None
    config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values))
    setattr(config, _FIELD, rows)
    return config


def make_room(model: nn.Module, config: PeftConfig | None) -> None:
    """Grow a fresh base to the rows that a saved adapter brings; padded bases have them already."""
    rows = getattr(config, _FIELD, None)
    if rows:
        every = [row for part in rows.values() for row in part] if isinstance(rows, dict) else rows
        before = swap.core(model).get_input_embeddings().weight.shape[0]
        tokens.resize(model, max(every) + 1)
        tokens.remember(model, [row for row in every if row >= before])


def join(model: Any, name: str, folder: Path, trainable: bool) -> bool:
    """Make the place for a saved adapter that joins others; return whether it brings rows.

    Raises:
        AdapterError: FG-TOKEN-009, it is one of virtual tokens, whose configuration holds no rows.
    """
    config = saved_config(folder)
    if config is None:
        return False
    if config.is_prompt_learning:
        raise AdapterError(
            "FG-TOKEN-009",
            f"{folder} brings rows of new tokens and virtual tokens, to join another adapter",
            allowed="a model of its own for such an adapter",
            fix=f"FastLanguageModel.from_pretrained('{folder}')",
        )
    make_room(model, config)
    config.inference_mode = not trainable
    model.add_adapter(name, config)
    return True


class FastTrainedRows:
    """Mixed into peft's layer of trained rows; see ``accelerate``."""

    def forward_adapters(
        self: Any, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """peft's result; no copy of the matrix and no gradient of its size."""
        found = None if args or kwargs else self.trained_rows(active_adapters)
        if found is None:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        base, (ids, rows) = self.base_layer, found
        out = base(x)
        if isinstance(base, nn.Linear):
            return out.index_copy(-1, ids, (x @ rows.t()).to(out.dtype))
        place = torch.searchsorted(ids, x).clamp_max_(len(ids) - 1)
        hit = (ids[place] == x).reshape(-1).nonzero().squeeze(-1)
        flat = out.reshape(-1, out.shape[-1])
        values = rows.index_select(0, place.reshape(-1)[hit]).to(out.dtype)
        return flat.index_copy(0, hit, values).view(out.shape)

    def trained_rows(
        self: Any, active_adapters: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ids [k], ascending, and rows [k, d] that replace those of the matrix; None: ask peft."""
        active = self.active_adapters if active_adapters is None else active_adapters
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        base, delta = self.base_layer, self.trainable_tokens_delta
        if active[0] not in delta or not _is_plain(base):
            return None
        weight = base.weight
        ids = torch.tensor(self.token_indices[active[0]], device=weight.device)
        order = ids.argsort()
        return ids[order], delta[active[0]][order].to(weight.dtype)


def _is_plain(base: nn.Module) -> bool:
    """Whether a lookup, or a product, in the frozen matrix is all that the layer does."""
    if base.weight.requires_grad:
        return False
    if type(base) is nn.Embedding:
        return base.max_norm is None
    return type(base) is nn.Linear and base.bias is None


def accelerate(model: nn.Module) -> int:
    """Swap every layer of trained rows inside ``model`` to the fast class; return how many."""
    fast = swap.fast_class(FastTrainedRows, TrainableTokensLayer)
    return sum(
        swap.swap(module, fast)
        for module in model.modules()
        if isinstance(module, TrainableTokensLayer)
    )
