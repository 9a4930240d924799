"""Fast classes for encoders of the BERT shape, shared by their family files.

What: an encoder that takes an ordinary padded batch, drops the pads right after reading the mask,
runs its layers on the real tokens behind one another, and puts the result back with zeros where
there was padding; heads, collators and trainers stay stock. How: each class is made once from the
stock class it replaces; on a CPU our path runs, and whatever it does not reproduce (decoders,
recorded hidden states or attentions, masks that hide a row's first token) runs under the stock
class. A sequence classification head reads one token a row, so with it the last layer computes only
that token's query and MLP. Constraint: same parameters, same state-dict keys, same results within
rounding; dropout has the same distribution from another random stream. Trade-off: on GPUs
everything stays stock until it has been measured there.

Shapes: b rows, w width of the padded batch, t tokens with filling, d hidden, h heads, f features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from finegraft.kernels import dropout as drop
from finegraft.kernels.encoder_attention import Rows, encoder_attention
from finegraft.kernels.gelu import gelu
from finegraft.kernels.layer_norm import layer_norm
from finegraft.models import swap, together
from finegraft.models.families._contract import Family

# Arguments that change nothing in the encoder, or that are handled here.
_HANDLED = {
    "position_ids",
    "inputs_embeds",
    "return_dict",
    "use_cache",
    "num_items_in_batch",
}
_RECORDS = ("output_attentions", "output_hidden_states")


class FlatEncoder:
    """Encoder stack that runs without padding."""

    takes_padded = True
    _own_arguments = _HANDLED

    def forward(
        self: Any, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Stock result, zeros in place of padding; see the module for what stays stock."""
        first = kwargs.pop("first_token_only", False)
        if args or not self._is_flat(input_ids, attention_mask, kwargs):
            with swap.stock(self):
                return self.forward(input_ids, attention_mask, *args, **kwargs)
        shaped = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        rows = _rows(shaped, attention_mask)
        hidden = self.embeddings(**self._flattened(rows, input_ids, kwargs))
        layers = self._layers()
        for layer in layers[:-1]:
            hidden = layer(hidden, None, rows=rows)  # [1, t, d]
        hidden = layers[-1](hidden, None, rows=rows, first_token_only=first)
        # With ``first`` [1, b, d] becomes [b, 1, d]: all that a head will read.
        return self._output(hidden.transpose(0, 1) if first else rows.pad(hidden))

    def _is_flat(self: Any, ids: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
        embeds = kwargs.get("inputs_embeds")
        shaped = ids if ids is not None else embeds
        if (
            shaped is None
            or (ids is not None and embeds is not None)
            or shaped.device.type != "cpu"
        ):
            return False
        if any(kwargs.get(name) or getattr(self.config, name, False) for name in _RECORDS):
            return False
        if kwargs.get("return_dict", getattr(self.config, "return_dict", True)) is False:
            return False
        given = {name for name, x in kwargs.items() if x is not None}
        if given - self._own_arguments - {*_RECORDS}:
            return False
        if mask is None:
            return shaped.shape[0] > 0 and shaped.shape[1] > 0
        # Heads read the first token, and stock encoders give hidden tokens a result too.
        return mask.dim() == 2 and mask.numel() > 0 and bool((mask[:, 0] != 0).all())

    def _flattened(self: Any, rows: Rows, ids: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the embeddings, without padding."""
        embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        shape = (ids if ids is not None else embeds).shape[:2]
        if positions is None:
            positions = self._positions(ids, embeds)
        given = {
            "input_ids": ids,
            "inputs_embeds": embeds,
            "position_ids": positions.expand(shape),
            "token_type_ids": kwargs.get("token_type_ids"),
        }
        flat = {name: rows.flatten(x) for name, x in given.items() if x is not None}
        return {"input_ids": None, **flat}  # DistilBERT's embeddings want the name said

    def _positions(self: Any, ids: Any, embeds: Any) -> torch.Tensor:
        width = (ids if ids is not None else embeds).shape[1]
        return self.embeddings.position_ids[:, :width]

    def _layers(self: Any) -> Any:
        return self.encoder.layer

    def _output(self: Any, hidden: torch.Tensor) -> Any:
        pooled = self.pooler(hidden) if self.pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled
        )


class FlatBert(FlatEncoder):
    """BERT's names; token types belong to it."""

    _own_arguments = _HANDLED | {"token_type_ids"}


class FlatRoberta(FlatBert):
    """Positions count from after the padding id, and skip tokens of that id."""

    def _positions(self: Any, ids: Any, embeds: Any) -> torch.Tensor:
        made, pad = self.embeddings, self.embeddings.padding_idx
        if ids is None:
            found = made.create_position_ids_from_inputs_embeds(embeds, pad)
        else:
            found = made.create_position_ids_from_input_ids(ids, pad)
        return found


class FlatDistilBert(FlatEncoder):
    """DistilBERT's names: no token types and no pooler."""

    def _layers(self: Any) -> Any:
        return self.transformer.layer

    def _output(self: Any, hidden: torch.Tensor) -> Any:
        return BaseModelOutput(last_hidden_state=hidden)


def _rows(shaped: torch.Tensor, mask: torch.Tensor | None) -> Rows:
    if mask is None:
        return Rows([shaped.shape[1]] * shaped.shape[0], None, shaped.shape[1])
    return Rows.of_mask(mask)


class FirstTokenHead:
    """Sequence classification, which reads the first token of each row and nothing else."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock result; the encoder is told that no other token is wanted."""
        if getattr(type(getattr(self, self.base_model_prefix)), "takes_padded", False):
            kwargs["first_token_only"] = True
        return super().forward(*args, **kwargs)


class RowAttention:
    """Self-attention inside each row; ``together`` are its projections' names."""

    together = ("query", "key", "value")

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock forward, or with ``rows`` attention inside each of them."""
        rows = kwargs.pop("rows", None)
        if rows is None:
            return super().forward(hidden_states, *args, **kwargs)
        first = kwargs.pop("first_token_only", False)
        asking, *others = (getattr(self, name) for name in self.together)
        if first:
            query = asking(rows.first(hidden_states))
            key, value = together.project(others, hidden_states)
        else:
            query, key, value = together.project([asking, *others], hidden_states)
        shape = (-1, self._heads(), self.attention_head_size)
        p = self.dropout.p if self.training else 0.0
        noise = drop.draw((rows.scores(self._heads(), first),)) if p else None
        out = encoder_attention(
            *(x.view(shape) for x in (query, key, value)), rows, self.scaling, first, noise, p
        )
        return self._project(out.view(1, out.shape[0], -1)), None

    def _heads(self: Any) -> int:
        return self.num_attention_heads

    def _project(self: Any, out: torch.Tensor) -> torch.Tensor:
        return out


class DistilBertRowAttention(RowAttention):
    """The same under DistilBERT's names, with the output projection inside."""

    together = ("q_lin", "k_lin", "v_lin")

    def _heads(self: Any) -> int:
        return self.n_heads

    def _project(self: Any, out: torch.Tensor) -> torch.Tensor:
        return self.out_lin(out)


class RowAttentionBlock:
    """BERT's attention with its output, whose residual must be of the tokens that ask."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock forward, or with ``first_token_only`` on the first token of each row."""
        if not kwargs.get("first_token_only"):
            kwargs.pop("first_token_only", None)
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.self(hidden_states, rows=kwargs["rows"], first_token_only=True)
        return self.output(attended, kwargs["rows"].first(hidden_states)), None


class FusedOutput:
    """Dense, dropout, residual add and layer norm, the last three in one function."""

    def forward(self: Any, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Stock result; the sum and two numbers a row are kept for backward."""
        hidden = self.dense(hidden_states)
        return add_norm(self.LayerNorm, hidden, input_tensor, self.dropout)


class FusedIntermediate:
    """Dense and exact GELU."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Stock result; the activation's derivative is kept for backward."""
        if hidden_states.device.type != "cpu":
            return super().forward(hidden_states)
        return gelu(self.dense(hidden_states))


class FusedBlock:
    """DistilBERT's layer, whose two residual adds and norms are one function each."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock result, or with ``first_token_only`` that of each row's first token."""
        attended, _ = self.attention(hidden_states, *args, **kwargs)
        if kwargs.get("first_token_only"):
            hidden_states = kwargs["rows"].first(hidden_states)
        attended = add_norm(self.sa_layer_norm, attended, hidden_states)
        return add_norm(self.output_layer_norm, self.ffn(attended), attended)


class FusedFfn:
    """DistilBERT's MLP with the exact GELU."""

    def ff_chunk(self: Any, input: torch.Tensor) -> torch.Tensor:
        """Stock result; the activation's derivative is kept for backward."""
        if input.device.type != "cpu":
            return super().ff_chunk(input)
        return self.dropout(self.lin2(gelu(self.lin1(input))))


class BitDropout:
    """Dropout from 16 random bits an element."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        """Stock distribution, the probability rounded to 1 / 65,536."""
        if not self.training or self.p in (0.0, 1.0) or input.device.type != "cpu" or self.inplace:
            return super().forward(input)
        return drop.dropout(input, drop.draw(input.shape), self.p)


def add_norm(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, dropout: nn.Module | None = None
) -> torch.Tensor:
    """Return ``norm(residual + dropout(x))``, fused where ``norm`` is a plain layer norm."""
    plain = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
    if (
        not plain
        or x.device.type != "cpu"
        or len(norm.normalized_shape) != 1
        or norm._forward_hooks
    ):
        return norm((x if dropout is None else dropout(x)) + residual)
    p = float(getattr(dropout, "p", 0.0)) if dropout is not None and dropout.training else 0.0
    if p >= 1.0:
        x, p = torch.zeros_like(x), 0.0
    noise = drop.draw(x.shape) if p else None
    return layer_norm(x, norm.weight, norm.bias, norm.eps, residual, noise, p)


def _fast(mixin: type) -> Any:
    """Return a function that makes the fast class of a stock class by mixing in ``mixin``."""
    whole = issubclass(mixin, FlatEncoder | FirstTokenHead)
    return functools.partial(swap.fast_class, mixin, shows_stock=whole)


def refuses(config: Any) -> str | None:
    """Why a configuration of this shape stays stock, or None."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    if activation != "gelu":
        return f"activation {activation} has no kernel"
    if getattr(config, "is_decoder", False):
        return "a decoder attends causally and keeps a cache"
    if getattr(config, "chunk_size_feed_forward", 0):
        return "the MLP is computed in chunks"
    return None


def family(prefix: str, swaps: dict[str, type], example: Callable[[], Any]) -> Family:
    """The record of a family of encoders.

    Args:
        prefix: Of transformers' class names.
        swaps: Stock class names besides the head's and dropout's, to the mixin each takes.
        example: Makes a small random classifier.
    """
    common = {f"{prefix}ForSequenceClassification": FirstTokenHead, "Dropout": BitDropout}
    return Family(
        swaps={name: _fast(mixin) for name, mixin in {**swaps, **common}.items()},
        refuses=refuses,
        tiny=example,
    )


def bert_shape(prefix: str, model: type, **settings: Any) -> Family:
    """A family whose classes are called ``<prefix>SelfAttention``, ``<prefix>Output`` ..."""
    swaps: dict[str, type] = {
        f"{prefix}Model": model,
        f"{prefix}SelfAttention": RowAttention,
        f"{prefix}Attention": RowAttentionBlock,
        f"{prefix}SelfOutput": FusedOutput,
        f"{prefix}Output": FusedOutput,
        f"{prefix}Intermediate": FusedIntermediate,
    }
    return family(prefix, swaps, functools.partial(tiny, prefix, settings))


def tiny(prefix: str, settings: dict[str, Any]) -> Any:
    """Two layers, three classes, weights wide enough to show a wrong path."""
    import transformers

    common = {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 520,
        "initializer_range": 0.2,
        "pad_token_id": 1,
        "num_labels": 3,
    }
    config = getattr(transformers, f"{prefix}Config")(**{**common, **settings})
    return getattr(transformers, f"{prefix}ForSequenceClassification")(config)
