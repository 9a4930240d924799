"""``FastLanguageModel``: Unsloth's front door over finegraft's layers.

What: loading, adapting and mode switching under the names, order and defaults that Unsloth's
scripts use. How: thin composition; everything it does is a function below. Constraint: a name that
means nothing here is answered with one logged line, an unknown one is an error with a near name.
Trade-off: two defaults depend on the machine (see ``from_pretrained``), because 4-bit weights and
recomputation buy memory that a CPU has and cost time that it has not.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from finegraft import adapters, opening
from finegraft.adapters import lora
from finegraft.core.arguments import Drop, translate
from finegraft.core.hardware import facts
from finegraft.export._bound import bind
from finegraft.inference import modes

logger = logging.getLogger(__name__)

LLAMA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)

_LOADING = {
    "fix_tokenizer": Drop("tokenizers are always checked"),
    "resize_model_vocab": Drop("vocabularies are never resized unasked"),
    "use_exact_model_name": Drop("names are always taken as they are"),
    "fast_inference": Drop("there is no vLLM inside; serve the exported model instead"),
    "gpu_memory_utilization": Drop("it belongs to fast_inference"),
    "float8_kv_cache": Drop("it belongs to fast_inference"),
    "disable_log_stats": Drop("it belongs to fast_inference"),
    "max_lora_rank": Drop("it belongs to fast_inference"),
    "offload_embedding": Drop("embeddings stay with the model"),
    "float32_mixed_precision": Drop("adapters are always float32"),
    "unsloth_tiled_mlp": Drop("it has no counterpart here"),
    "qat_scheme": Drop("quantization-aware training is not available"),
    "load_in_fp8": Drop("FP8 bases are not available"),
    "use_kernels": Drop("modules are swapped visibly instead; see finegraft.models.swap.report"),
}
_ADAPTING = {
    "temporary_location": Drop("nothing is offloaded to disk"),
    "qat_scheme": Drop("quantization-aware training is not available"),
    "max_seq_length": Drop("the length is the trainer's max_length"),
}
_LOAD_EXTRAS = {
    "quantization_config",
    "attn_implementation",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
}
_LORA_EXTRAS = {
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
    "adapter_name",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
    "exclude_modules",
    "lora_bias",
    "eva_config",
}


def is_bfloat16_supported() -> bool:
    """Whether bfloat16 is native on the device that models are put on, GPU or CPU."""
    return facts().native_bf16


class FastLanguageModel:
    """Load, adapt and switch causal language models; every method is static."""

    @staticmethod
    def from_pretrained(
        model_name: str = "demo",
        max_seq_length: int | None = 2048,
        dtype: Any = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = None,
        rope_scaling: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        random_state: int = 3407,
        **more: Any,
    ) -> tuple[Any, Any]:
        """Load a model and its tokenizer.

        Args:
            model_name: Hub name, folder, GGUF file, adapter or run folder, ``demo``.
            max_seq_length: In tokens.
            dtype: Of the weights; None: bfloat16 where it is native, else float32 on CPUs.
            load_in_4bit: NF4 through bitsandbytes. Unset, it is Unsloth's True on a GPU and False
                on a CPU, where 4-bit weights cost time and memory is not what is short.
            load_in_8bit: LLM.int8 through bitsandbytes.
            load_in_16bit: No quantization.
            full_finetuning: No quantization, every weight trains, no adapter needed.
            use_gradient_checkpointing: True recomputes activations; "unsloth" does so on a GPU.
            random_state: Kept for ``get_peft_model``; loading draws no random numbers.
            more: ``quantization_config``, ``attn_implementation``, and names of Unsloth's that
                mean nothing here.

        Returns:
            A transformers (or peft) model and its tokenizer.

        Raises:
            ModelError: FG-MODEL-001 to FG-MODEL-013; AdapterError: FG-ADAPT-003.
            ArgumentError: FG-ARG-001, an unknown name.
        """
        extra = translate(
            "from_pretrained",
            more,
            _known(FastLanguageModel.from_pretrained) | _LOAD_EXTRAS,
            _LOADING,
        )
        whole = load_in_16bit or full_finetuning or load_in_8bit or "quantization_config" in extra
        if load_in_4bit is None:
            load_in_4bit = bool(facts().gpus) and not whole
        opened = opening.open_model(
            model_name,
            revision=revision,
            token=token,
            max_seq_length=max_seq_length,
            trainable=True,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            load_in_4bit=load_in_4bit and not whole,
            load_in_8bit=load_in_8bit,
            device_map=_placement(device_map),
            rope_scaling=rope_scaling,
            **extra,
        )
        if full_finetuning:
            opened.model.requires_grad_(True)
        elif opened.located.kind != "adapter":
            opened.model.requires_grad_(False)
        _checkpointing(opened.model, use_gradient_checkpointing)
        return bind(opened.model), opened.tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: list[str] | tuple[str, ...] | str = LLAMA_TARGETS,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        method: str = "lora",
        **more: Any,
    ) -> Any:
        """Attach a new adapter.

        Args:
            r: Rank, at least 1.
            target_modules: Names of linear layers, or "all-linear". The default stands for all
                linear layers of whatever family the model is.
            random_state: Seed of the adapter's start; the global random state is left alone.
            method: One of ``finegraft.adapters.names()``. The names above are those of LoRA; what
                another method does not have is refused when it is set.
            more: Further settings of the method, for LoRA fields of peft's ``LoraConfig``;
                ``adapter_name``; ``task_type``, by default what the model's class is for.

        Returns:
            A peft model; only the adapter trains.

        Raises:
            AdapterError: those of ``finegraft.adapters.attach``, for LoRA FG-ADAPT-001 unknown
                target, FG-ADAPT-002 rank below 1, FG-ADAPT-004.
            ArgumentError: FG-ARG-001, an unknown name.
        """
        found, _ = adapters.find(method)
        known = _known(FastLanguageModel.get_peft_model) | _LORA_EXTRAS
        if found is not lora.METHOD:  # attach knows the names of the others
            known = set(more) - set(_ADAPTING)
        extra = translate("get_peft_model", more, known, _ADAPTING)
        if found.not_recomputed and use_gradient_checkpointing == "unsloth":
            use_gradient_checkpointing = False
            if model.is_gradient_checkpointing:
                model.gradient_checkpointing_disable()
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            own = _settings(
                method,
                r=r,
                target_modules=target_modules,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                bias=bias,
                layers_to_transform=layers_to_transform,
                layers_pattern=layers_pattern,
                use_rslora=use_rslora,
                modules_to_save=modules_to_save,
                init_lora_weights=init_lora_weights,
                loftq_config=loftq_config,
            )
            model = adapters.attach(model, method, **own, **extra)
        _checkpointing(model, use_gradient_checkpointing)
        return bind(model)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Eval mode with the cache on and a fast ``generate``; ``for_training`` takes both back."""
        return modes.for_inference(model)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode as it was before ``for_inference``."""
        model = modes.for_training(model)
        if use_gradient_checkpointing is not None:
            _checkpointing(model, use_gradient_checkpointing)
        return model


def _settings(method: str, **given: Any) -> dict[str, Any]:
    """What ``get_peft_model`` hands on: for LoRA everything, else what is no default of its."""
    parameters = inspect.signature(FastLanguageModel.get_peft_model).parameters
    chosen = {n: v for n, v in given.items() if v != parameters[n].default}
    found, preset = adapters.find(method)
    if found is not lora.METHOD:
        return chosen
    usual = {n: v for n, v in given.items() if n not in {*preset, "loftq_config"}}
    return {**usual, "target_modules": lora.ALL_LINEAR, **chosen}


def _known(function: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _placement(device_map: Any) -> Any:
    """Unsloth's "sequential" fills GPU after GPU; it means nothing where there is none."""
    return None if device_map == "sequential" and not facts().gpus else device_map


def _checkpointing(model: Any, wanted: bool | str) -> None:
    """Recompute activations in backward: True always, "unsloth" where memory is on a GPU."""
    if wanted is True or (wanted == "unsloth" and facts().gpus):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
