"""What llama.cpp calls a model's parts and how it wants them.

What: ``ARCHITECTURES`` by ``config.model_type``: GGUF's name, which tensors change on their way,
which facts of the configuration are written, and what llama.cpp cannot run. How: names come from
the ``gguf`` package's own map; the rest is a few lines for each architecture. Constraint: a setting
that llama.cpp would ignore or read otherwise is an error here, for the file would load and answer
differently. Trade-off: two such cases only warn, sliding windows of Llama-shaped models and of
Phi-3, because they change nothing for texts shorter than the window.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGUFWriter,
    RopeScalingType,
    TensorNameMap,
    get_tensor_name_map,
)

from finegraft.core.errors import ExportError

logger = logging.getLogger(__name__)

# Buffers that some checkpoints hold.
_NO_WEIGHTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
# (name in the file, tensor, config) -> what is stored
Change = Callable[[str, torch.Tensor, Any], torch.Tensor]
Extra = dict[str, torch.Tensor]
FULL, SLIDING = "full_attention", "sliding_attention"


def _unchanged(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        id: Its entry in the ``gguf`` package.
        write: Writes what the configuration says.
        change: What happens to a tensor on its way into the file.
        extra: Tensors that the file holds and the model does not, frequencies say.
        renamed: Names in the checkpoint that the package's map gives no or another place.
        dropped: Beginnings of names that llama.cpp has no use for.
        untied: Whether the file may have a head of its own.
    """

    id: MODEL_ARCH
    write: Callable[[GGUFWriter, Any], None]
    change: Change = _unchanged
    extra: Callable[[Any], Extra] = lambda config: {}
    renamed: Mapping[str, str] | None = None
    dropped: tuple[str, ...] = ()
    untied: bool = True

    @property
    def name(self) -> str:
        """What llama.cpp calls it."""
        return str(MODEL_ARCH_NAMES[self.id])


def refuse(found: str, fix: str = "merge and use it with transformers or vLLM") -> ExportError:
    """The error for a setting that GGUF has no place for."""
    return ExportError(
        "FG-EXPORT-010",
        f"llama.cpp cannot run this configuration: {found}",
        allowed="what the published models of this family use",
        fix=fix,
    )


# --- names -------------------------------------------------------------------------------------


def place(architecture: Architecture, name: str, config: Any) -> str | None:
    """Return the name in the file of the tensor ``name``, None for one that is left out.

    Raises:
        ExportError: FG-EXPORT-009, the architecture has no such tensor.
    """
    bare = name
    for prefix in ("bert.", "model."):
        bare = bare.removeprefix(prefix)
    if bare.startswith(architecture.dropped) or bare.endswith(_NO_WEIGHTS):
        return None
    for old, new in (architecture.renamed or {}).items():
        if bare.startswith(old):
            return new + bare.removeprefix(old)
    names = _names(architecture.id, config.num_hidden_layers)
    for candidate in (bare, f"model.{bare}"):
        found = names.get_name(candidate, try_suffixes=(".weight", ".bias"))
        if found is not None:
            return found
    raise ExportError(
        "FG-EXPORT-009",
        f"the tensor '{name}' has no place in a GGUF file of architecture '{architecture.name}'",
        allowed="the weights of a plain model of this family",
        fix="merge adapters first; export the language model of a model that also sees or hears",
    )


@functools.cache
def _names(id: MODEL_ARCH, layers: int) -> TensorNameMap:
    return get_tensor_name_map(id, layers)


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of q or k as llama.cpp's rotation of neighbouring features wants them.

    transformers rotates feature i with i + f / 2, llama.cpp's ``llama`` architecture 2i with
    2i + 1. Without this the file answers fluently and wrongly.

    Args:
        weight: [heads * f, ...], or a bias [heads * f].
        heads: Of this projection.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])  # [h, 2, f / 2, ...]
    return halves.transpose(1, 2).reshape(weight.shape)


def _rotate_q_and_k(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    part = name.split(".")[-2]
    if part == "attn_q":
        return rotated(tensor, config.num_attention_heads)
    if part == "attn_k":
        return rotated(tensor, config.num_key_value_heads)
    return tensor


def _one_more(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Gemma's norms multiply by 1 + weight, llama.cpp's by the weight."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


# --- facts -------------------------------------------------------------------------------------


def _rope(config: Any) -> dict[str, Any]:
    """Rotation settings of the layers that see everything."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return dict(found.get(FULL, found))


def _head_size(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _write_common(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _write_decoder(writer: GGUFWriter, config: Any) -> None:
    _check_activation(config)
    _write_common(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_rope(writer, config)


def _check_activation(config: Any, *, known: tuple[str, ...] = ("silu", "swish")) -> None:
    kind = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if kind not in known:
        raise refuse(f"activation '{kind}', llama.cpp computes {known[0]}")


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    """The base and, where a model has one, the scaling of its rotation."""
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = str(rope.get("rope_type", "default"))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _write_yarn(writer, rope, config)
    elif kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    elif kind not in ("default", "llama3"):  # llama3's factors are a tensor
        raise refuse(f"rope_type '{kind}'")


def _write_yarn(writer: GGUFWriter, rope: dict[str, Any], config: Any) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    first = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(first)
    for key in ("mscale", "mscale_all_dim"):
        if rope.get(key):
            raise refuse(f"yarn with {key}")
    for key, add in (
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.get(key) is not None:
            add(rope[key])


def _no_partial_rotation(config: Any) -> None:
    part = _rope(config).get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise refuse(f"partial_rotary_factor {part}")


def _write_llama(writer: GGUFWriter, config: Any) -> None:
    _no_partial_rotation(config)
    _write_decoder(writer, config)
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    _warn_of_window(config)


def _warn_of_window(config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    if window and uses and window < config.max_position_embeddings:
        logger.warning(
            "llama.cpp ignores the sliding window of %s tokens: texts longer than that are "
            "answered differently",
            f"{window:,}",
        )


def _write_qwen(writer: GGUFWriter, config: Any) -> None:
    _no_partial_rotation(config)
    _write_decoder(writer, config)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _warn_of_window(config)


def _llama3_factors(config: Any) -> Extra:
    """Divisors of the frequencies of Llama 3.1 and later, [f / 2].

    Source: the Llama 3.1 release; transformers computes the same from the same four numbers.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    size = _head_size(config)
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    waves = 2 * math.pi / (1.0 / rope["rope_theta"] ** steps)  # wavelengths in tokens
    first, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (first / waves - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = factors.masked_fill(waves > first / low, factor)
    return {"rope_freqs.weight": factors.masked_fill(waves < first / high, 1.0)}


def _write_gemma(writer: GGUFWriter, config: Any, every: int, large: int) -> None:
    """What Gemma 2 and 3 share.

    Args:
        every: Layers from one that sees everything to the next, if the file says nothing.
        large: Layers of the 27B model, whose scores llama.cpp scales otherwise.
    """
    _check_activation(config, known=("gelu_pytorch_tanh",))
    if getattr(config, "use_bidirectional_attention", False):
        raise refuse("attention in both directions")
    size, layers = _head_size(config), config.num_hidden_layers
    scale = config.hidden_size // config.num_attention_heads if layers == large else size
    if config.query_pre_attn_scalar != scale:
        raise refuse(f"query_pre_attn_scalar {config.query_pre_attn_scalar} instead of {scale}")
    _write_common(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_sliding_window(config.sliding_window)
    usual = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    if list(config.layer_types) != usual:
        writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _write_rope(writer, config)


def _write_gemma2(writer: GGUFWriter, config: Any) -> None:
    _write_gemma(writer, config, every=2, large=46)
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        raise refuse("Gemma 2 without caps on scores and logits")
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)


def _write_gemma3(writer: GGUFWriter, config: Any) -> None:
    if getattr(config, "attn_logit_softcapping", None):
        raise refuse("Gemma 3 with a cap on scores")
    _write_gemma(writer, config, every=6, large=62)
    near = dict(config.rope_parameters.get(SLIDING) or {})
    if near.get("rope_type", "default") != "default":
        raise refuse(f"rope_type '{near['rope_type']}' in sliding layers")
    if "rope_theta" in near:
        writer.add_rope_freq_base_swa(near["rope_theta"])


def _rotary_size(config: Any) -> int:
    part = _rope(config).get("partial_rotary_factor") or 1.0
    return int(part * config.hidden_size) // config.num_attention_heads


def _write_phi3(writer: GGUFWriter, config: Any) -> None:
    _write_decoder(writer, config)
    writer.add_rope_dimension_count(_rotary_size(config))
    writer.add_rope_scaling_orig_ctx_len(_first_context(config))
    writer.add_sliding_window(config.sliding_window or 0)  # 0 tells Phi-4 from Phi-3
    _warn_of_window(config)
    rope, first = _rope(config), _first_context(config)
    if rope.get("long_factor"):
        scale = config.max_position_embeddings / first
        factor = math.sqrt(1 + math.log(scale) / math.log(first)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or factor)


def _first_context(config: Any) -> int:
    found = _rope(config).get("original_max_position_embeddings")
    found = found or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def _phi3_factors(config: Any) -> Extra:
    rope = _rope(config)
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
        if rope.get(f"{kind}_factor")
    }


def _write_bert(writer: GGUFWriter, config: Any) -> None:
    _check_activation(config, known=("gelu",))
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise refuse(f"position_embedding_type '{config.position_embedding_type}'")
    if getattr(config, "is_decoder", False):
        raise refuse("BERT as a decoder")
    _write_common(writer, config)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(config.type_vocab_size)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, _write_llama, _rotate_q_and_k, _llama3_factors),
    "mistral": Architecture(MODEL_ARCH.LLAMA, _write_llama, _rotate_q_and_k, _llama3_factors),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, _write_qwen),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, _write_qwen),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, _write_gemma2, _one_more, untied=False),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, _write_gemma3, _one_more),
    "phi3": Architecture(MODEL_ARCH.PHI3, _write_phi3, extra=_phi3_factors),
    "bert": Architecture(
        MODEL_ARCH.BERT,
        _write_bert,
        renamed={"pooler.dense": "cls", "classifier": "cls.output"},
        dropped=("cls.predictions", "cls.seq_relationship"),
        untied=False,
    ),
}


def find(config: Any) -> Architecture:
    """Return the architecture of a configuration.

    Raises:
        ExportError: FG-EXPORT-003, none that this exporter knows.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(
            "FG-EXPORT-003",
            f"models of type '{kind}' cannot be written as GGUF",
            allowed=", ".join(ARCHITECTURES),
            fix="save a merged model and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    return ARCHITECTURES[kind]
