"""Quantised bases that survive an evaluation.

What: the bitsandbytes settings, and ``protect`` for every quantised model. How: NF4 with double
quantisation, compute in the given dtype. Constraint: on CPUs with AVX512-BF16 the first eval-mode
forward of a ``Linear4bit`` repacks its weights in place; from then on training gives no input
gradient and dequantising gives garbage. ``protect`` switches that path off on each instance.
Trade-off: evaluation on such CPUs dequantises on every call, as training does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finegraft.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def config_for(
    load_in_4bit: bool, load_in_8bit: bool, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return the settings for loading quantised, None for neither flag.

    Args:
        load_in_4bit: NF4 with double quantisation.
        load_in_8bit: LLM.int8.
        compute_dtype: Dtype of the products and of what is not quantised.

    Raises:
        ConfigError: FG-CONF-003, both flags.

    Source:
        QLoRA, https://arxiv.org/abs/2305.14314; LLM.int8(), https://arxiv.org/abs/2208.07339
    """
    if load_in_4bit and load_in_8bit:
        raise ConfigError(
            "FG-CONF-003",
            "load_in_4bit and load_in_8bit are both set",
            allowed="one of the two",
            fix="remove one of them",
        )
    if not (load_in_4bit or load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def protect(model: PreTrainedModel) -> int:
    """Keep every 4-bit layer from repacking its weights, and return how many there are.

    Must run before the first forward. Harmless on GPUs and on CPUs without AVX512-BF16.

    Raises:
        ModelError: FG-MODEL-014, the weights were repacked by an evaluation already.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                "FG-MODEL-014",
                "this 4-bit model was evaluated before training, which repacked its weights",
                allowed="a 4-bit model that has answered nothing yet, or FastLanguageModel's",
                fix="load it again; to ask it first, call finegraft.models.quantize.protect(model)",
            )
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
