"""Fast classes for decoders of the Llama shape, shared by their family files.

What: a model whose batches become flat rows of documents, attention inside documents, rotary, RMS
norm and gated MLP through our kernels. How: each class is made once from the stock class it
replaces; calls that want states for a loss run our path, every other call (generation, caches) the
stock forward. Constraint: same parameters, same state-dict keys, same results within rounding.
Trade-off: each layer leaves its last sum to whoever norms it next, which joins two passes over the
residual into one and makes a layer's output a pair.

Shapes: t tokens of a flat batch, d hidden, h heads, k key heads, f features of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from finegraft.kernels.add_rms_norm import add_rms_norm
from finegraft.kernels.document_attention import document_attention
from finegraft.kernels.rms_norm import rms_norm
from finegraft.kernels.rotary import one_half
from finegraft.kernels.swiglu import swiglu
from finegraft.models import flat, swap, together
from finegraft.models.families._contract import Family


class DocumentModel:
    """Decoder stack that computes no padding and lets no document see another.

    Besides the stock arguments it takes ``seq_lengths`` [n], the documents of a flat batch [1, t],
    ``prefix_length``, which says that the first of them is the beginning of all others, and
    ``rows`` [m], the places in b * t whose final state alone is wanted, as [1, m, d].
    """

    takes_documents = True

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        """The stock result; hidden places of a mask hold zeros where the flat path ran."""
        rows = kwargs.pop("rows", None)
        batch = flat.take(self.config, self.training, input_ids, kwargs)
        if batch is None:
            with swap.stock(self):  # transformers looks up by class name what it is to record
                out = self.forward(input_ids, **kwargs)
            if rows is not None:
                states = out.last_hidden_state
                out.last_hidden_state = states.reshape(-1, states.shape[-1])[rows][None]
            return out
        embedded = self.embed_tokens(batch.ids) if batch.embedded is None else batch.embedded
        hidden, delta = self._layers(embedded, batch)
        if rows is not None:
            rows = batch.rows(rows)
            hidden, delta = hidden.index_select(0, rows), delta.index_select(0, rows)
        _, hidden = add_norm(hidden, delta, self.norm)
        hidden = batch.restored(hidden) if rows is None else hidden[None]
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _layers(self: Any, embedded: torch.Tensor, batch: flat.FlatBatch) -> Any:
        """[1, t, d] to the residual [t, d] and what the last layer adds to it."""
        hidden, delta, angles = embedded[0], None, {}
        for layer in self.layers[: self.config.num_hidden_layers]:
            # Families with one rotation for all layers do not name its kind.
            kind = getattr(layer.self_attn, "layer_type", None)
            kind = kind if hasattr(self.rotary_emb, f"{kind}_inv_freq") else None
            if kind not in angles:
                angles[kind] = self._angles(embedded, batch.positions, kind)
            # Positional, because reentrant checkpointing sees no tensor among the keywords.
            hidden, delta = layer(
                hidden, delta, documents=batch.documents, position_embeddings=angles[kind]
            )
        return hidden, delta

    def _angles(self: Any, embedded: torch.Tensor, positions: Any, kind: str | None) -> Any:
        """Cos and sin [t, f / 2] that a layer rotates by."""
        more = {} if kind is None else {"layer_type": kind}
        cos, sin = self.rotary_emb(embedded, position_ids=positions, **more)  # [1, t, f]
        return one_half(cos), one_half(sin)


class DocumentLayer:
    """Decoder layer that hands its last sum on to whoever norms it next."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock forward, or with ``documents`` the residual [t, d] and what is to be added to it.

        The second positional argument is then what the layer before left to be added, or None.
        """
        if "documents" not in kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        hidden, normed = add_norm(hidden_states, args[0], self.input_layernorm)
        out, _ = self.self_attn(normed, **kwargs)
        hidden, normed = add_norm(hidden, out, self.post_attention_layernorm)
        return hidden, self.mlp(normed)


def sliding_window(attention: Any) -> int | None:
    """Tokens that a token of this attention sees, itself included; None: all before it."""
    # Families that slide in every layer say so in the configuration, others in the module.
    window: int | None = getattr(
        attention, "sliding_window", getattr(attention.config, "sliding_window", None)
    )
    return window


class DocumentAttention:
    """Attention that takes ``documents`` and angles as [t, f / 2]."""

    together = ("q_proj", "k_proj", "v_proj")

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock forward, or with ``documents`` causal attention inside each of them, [t, d]."""
        documents = kwargs.pop("documents", None)
        if documents is None:
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = self._project(hidden_states)
        softcap = getattr(self, "attn_logit_softcapping", None)
        angles = kwargs["position_embeddings"]
        out = document_attention(
            query, key, value, documents, self.scaling, sliding_window(self), softcap, angles
        )
        return self.o_proj(out.reshape(out.shape[0], -1)), None

    def _project(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[t, d] to query [t, h, f], key and value [t, k, f]."""
        modules = [getattr(self, name) for name in self.together]
        query, key, value = (
            x.view(x.shape[0], -1, self.head_dim) for x in together.project(modules, hidden)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value


class FusedQkvAttention(DocumentAttention):
    """The same for families that store q, k and v as one projection."""

    together = ()

    def _project(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads, keys = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = self.qkv_proj(hidden).view(hidden.shape[0], -1, self.head_dim)
        return qkv.split([heads, keys, keys], 1)


class FusedRmsNorm:
    """RMS norm through our kernel while gradients are needed."""

    offset = 0.0

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Stock result; no float32 copy is kept for backward."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self._eps(), self.offset)

    def add(self: Any, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of both, and its norm."""
        return add_rms_norm(x, delta, self.weight, self._eps(), self.offset)

    def _eps(self: Any) -> float:
        return self.variance_epsilon


def add_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, norm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``hidden`` with what is to be added to it, and its norm."""
    if delta is None:
        return hidden, norm(hidden)
    if isinstance(norm, FusedRmsNorm):
        return norm.add(hidden, delta)
    hidden = hidden + delta
    return hidden, norm(hidden)


class FusedGatedMlp:
    """Gated MLP whose activation and product are one function."""

    together = ("gate_proj", "up_proj")
    activation = staticmethod(swiglu)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Stock result; only gate and up are kept for backward."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        gate, up = together.project([self.gate_proj, self.up_proj], x)
        return self.down_proj(self.activation(gate, up))


class FusedGateUpMlp:
    """The same for families that store gate and up as one projection."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Stock result; only gate and up are kept for backward."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up))


def fast(mixin: type) -> Any:
    """Return a function that makes the fast class of a stock class by mixing in ``mixin``."""
    return functools.partial(swap.fast_class, mixin)


def refuses(config: Any) -> str | None:
    """Why a configuration of this shape stays stock, or None."""
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"activation {config.hidden_act} has no kernel"
    if getattr(config, "attention_dropout", 0.0):
        return "dropout on attention weights has no kernel"
    return None


def family(prefix: str, *, fused: bool = False, **tiny_settings: Any) -> Family:
    """The record of a family of the Llama shape whose classes are called ``<prefix>Model`` ...

    Args:
        prefix: Of transformers' class names.
        fused: q, k, v are one projection, and so are gate and up.
        tiny_settings: Fields of the tiny configuration besides the common ones.
    """
    return Family(
        swaps={
            f"{prefix}Model": fast(DocumentModel),
            f"{prefix}DecoderLayer": fast(DocumentLayer),
            f"{prefix}Attention": fast(FusedQkvAttention if fused else DocumentAttention),
            f"{prefix}MLP": fast(FusedGateUpMlp if fused else FusedGatedMlp),
            f"{prefix}RMSNorm": fast(FusedRmsNorm),
        },
        refuses=refuses,
        tiny=functools.partial(tiny, prefix, tiny_settings),
    )


def tiny(prefix: str, settings: dict[str, Any], config: str | None = None) -> Any:
    """Two layers with grouped-query attention and weights wide enough to show a wrong path."""
    import transformers

    common = {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    made = getattr(transformers, config or f"{prefix}Config")(**{**common, **settings})
    return getattr(transformers, f"{prefix}ForCausalLM")(made)
