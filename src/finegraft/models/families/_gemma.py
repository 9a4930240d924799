"""What Gemma 2 and 3 do differently from the Llama shape.

What: norms before and after each half of a layer, norm weights stored around zero, a gated gelu,
capped attention scores (Gemma 2), rotations that depend on the layer's kind (Gemma 3). How: classes
over those of ``_decoder``. Constraint: what takes the stock path (generation, caches) needs
``attn_implementation="eager"`` in Gemma 2, because transformers' SDPA refuses capped scores.

Shapes: t tokens, d hidden.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from finegraft.kernels.geglu import geglu
from finegraft.models.families import _decoder as decoder
from finegraft.models.families._contract import Family


class SandwichLayer:
    """Decoder layer with norms on both sides of attention and MLP."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock forward, or with ``documents`` the residual [t, d] and what is to be added."""
        if "documents" not in kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        hidden, normed = decoder.add_norm(hidden_states, args[0], self.input_layernorm)
        out, _ = self.self_attn(normed, **kwargs)
        out = self.post_attention_layernorm(out)
        hidden, normed = decoder.add_norm(hidden, out, self.pre_feedforward_layernorm)
        return hidden, self.post_feedforward_layernorm(self.mlp(normed))


class OffsetRmsNorm(decoder.FusedRmsNorm):
    """RMS norm whose weight is stored minus one."""

    offset = 1.0

    def _eps(self: Any) -> float:
        return self.eps


class GeluMlp(decoder.FusedGatedMlp):
    """Gated MLP with gelu."""

    activation = staticmethod(geglu)


def refuses(config: Any) -> str | None:
    """Why a configuration of this shape stays stock, or None."""
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"activation {config.hidden_activation} has no kernel"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions has no kernel"
    if config.attention_dropout:
        return "dropout on attention weights has no kernel"
    return None


def family(prefix: str, model: str, config: str, **tiny_settings: Any) -> Family:
    """The record of a Gemma family.

    Args:
        prefix: Of transformers' class names.
        model: Name of the decoder's class.
        config: Name of the configuration's class.
        tiny_settings: Fields of the tiny configuration besides the common ones.
    """
    return Family(
        swaps={
            model: decoder.fast(decoder.DocumentModel),
            f"{prefix}DecoderLayer": decoder.fast(SandwichLayer),
            f"{prefix}Attention": decoder.fast(decoder.DocumentAttention),
            f"{prefix}MLP": decoder.fast(GeluMlp),
            f"{prefix}RMSNorm": decoder.fast(OffsetRmsNorm),
        },
        refuses=refuses,
        tiny=functools.partial(_tiny, prefix, config, tiny_settings),
    )


def _tiny(prefix: str, config: str, settings: dict[str, Any]) -> Any:
    settings = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 30, **settings}
    made = decoder.tiny(prefix, {**settings, "attn_implementation": "eager"}, config)
    with torch.no_grad():  # weights of zero would hide a norm that leaves them out
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.3, 0.3)
    return made
