"""Quantised bases that survive an evaluation.

What: the bitsandbytes settings, ``protect`` for every quantised model, and the preparation that
older scripts ask for. How: NF4 with double quantisation, compute in the given dtype. Constraint: on
CPUs with AVX512-BF16 the first eval-mode forward of a ``Linear4bit`` repacks its weights in place;
from then on training gives no input gradient and dequantising gives garbage. ``protect`` switches
that path off on each instance, and gives layers whose rows end inside a block of 64, which
bitsandbytes 0.50 reads with a neighbour's scale on CPUs, a forward of our own. Trade-off:
evaluation on such CPUs dequantises on every call, as training does.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from finegraft.core.errors import ConfigError, ModelError
from finegraft.models import swap

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel


KINDS = ("nf4", "fp4")
_PLAIN = torch.nn.Parameter  # what bitsandbytes quantises is of classes of its own


def config_for(
    load_in_4bit: bool,
    load_in_8bit: bool,
    compute_dtype: torch.dtype,
    kind: str = "nf4",
    double: bool = True,
) -> BitsAndBytesConfig | None:
    """Return the settings for loading quantised, None for neither flag.

    Args:
        load_in_4bit: In blocks of 64 values, 4 bits a value.
        load_in_8bit: LLM.int8.
        compute_dtype: Dtype of the products of 4-bit layers.
        kind: ``nf4`` or ``fp4``, the 16 values that 4 bits stand for.
        double: Quantise the scales of the blocks as well: 0.37 bits a weight less.

    Raises:
        ConfigError: FG-CONF-003, both flags; FG-MODEL-015, another kind of 4 bits.

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
    if kind not in KINDS:
        raise ConfigError(
            "FG-MODEL-015",
            f"bnb_4bit_quant_type is {kind!r}",
            allowed=", ".join(KINDS),
            fix="bnb_4bit_quant_type='nf4', which loses least on normally distributed weights",
        )
    if not (load_in_4bit or load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
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
        if misread(layer.weight):
            swap.swap(layer, _exact_class())
    return len(layers)


def misread(weight: Any) -> bool:
    """Whether bitsandbytes dequantises this 4-bit weight wrongly: its rows end inside a block."""
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu":
        return False
    return bool(state.shape[-1] % state.blocksize)


@functools.cache
def _exact_class() -> type[nn.Module]:
    from bitsandbytes.nn import Linear4bit

    from finegraft.kernels import nf4

    class FastLinear4bit(Linear4bit):
        """A 4-bit layer of any width, made dense by our own function for every product."""

        stock_class = Linear4bit

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            """Same contract as the stock layer's."""
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), nf4.dense(self.weight, dtype=dtype), bias).to(x.dtype)

    return FastLinear4bit


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The 4-bit and 8-bit linear layers of ``model`` by name."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dense_weight(layer: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the weight of a quantised layer as its plain counterpart would hold it.

    Args:
        layer: One of ``quantized_layers``.
        dtype: Of the result; None: the one it was quantised from, float32 for 8 bits.

    Returns:
        [out, in], or [in, out] where the layer took the place of a ``Conv1D``.

    Raises:
        ModelError: FG-MODEL-014, an evaluation has repacked it.
    """
    from transformers.pytorch_utils import Conv1D

    from finegraft.kernels import nf4

    if hasattr(layer, "state"):
        values = layer.state.CB if layer.state.CB is not None else layer.weight.data
        scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        dense = (values.float() * (scale.float() / 127.0)[:, None]).to(dtype or torch.float32)
    else:
        dense = nf4.dense(layer.weight, dtype=dtype)
    turned = issubclass(getattr(layer, "source_cls", torch.nn.Linear), Conv1D)
    return dense.T.contiguous() if turned else dense


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Make a quantised model ready for training the cautious way; nothing here asks for it.

    Everything that is not quantised becomes float32 and the whole base is frozen. That takes 18%
    more memory for a 3.8B model and slows every layer that is not quantised; bfloat16 trains as
    well where the machine has it.

    Args:
        model: Loaded in 4 or 8 bits; changed in place.
        use_gradient_checkpointing: Recompute activations in backward.
            ``model.gradient_checkpointing_disable()`` takes it back.
        gradient_checkpointing_kwargs: Of ``torch.utils.checkpoint``; unset, not reentrant.

    Returns:
        The same model.

    Raises:
        ModelError: FG-MODEL-017, the model is not quantised; FG-MODEL-014 as in ``protect``.
    """
    if not getattr(model, "is_quantized", False):
        raise ModelError(
            "FG-MODEL-017",
            f"prepare_model_for_kbit_training got a {type(model).__name__} that is not quantized",
            allowed="a model loaded with load_in_4bit=True or load_in_8bit=True",
            fix="leave the call out",
        )
    protect(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.bfloat16, torch.float16) and type(parameter) is _PLAIN:
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.enable_input_require_grads()
    return model


def rounded_to_4bit(weight: torch.Tensor) -> torch.Tensor:
    """Return what a weight [out, in] is after ``load_in_4bit`` (NF4, double quantisation)."""
    from bitsandbytes.functional import quantize_4bit

    from finegraft.kernels import nf4

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return nf4.dense(packed, state, weight.dtype)
