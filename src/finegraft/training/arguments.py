"""``SFTConfig`` and ``TrainingArguments`` that take any year's names and any machine.

What: trl's and transformers' own dataclasses with three differences: 2024 names are translated,
nothing has to be said for a machine without a GPU, and nothing reports anywhere by default.
Constraint: still instances of the stock classes, so stock code takes them.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import transformers
import trl

from finegraft.core.arguments import Drop, Rename, translate
from finegraft.core.hardware import facts
from finegraft.training.optimizer import check_ratio

logger = logging.getLogger(__name__)

LEGACY = {
    "max_seq_length": Rename("max_length"),
    "evaluation_strategy": Rename("eval_strategy"),
    "no_cuda": Rename("use_cpu"),
    "warmup_ratio": Rename("warmup_steps"),  # below 1 it is a share of the steps
    "group_by_length": Rename(
        "train_sampling_strategy", lambda on: "group_by_length" if on else "random"
    ),
    "per_gpu_train_batch_size": Rename("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Rename("per_device_eval_batch_size"),
    "push_to_hub_token": Rename("hub_token"),
    "push_to_hub_model_id": Rename("hub_model_id"),
    "logging_dir": Drop("trackers choose their folder themselves (TENSORBOARD_LOGGING_DIR)"),
    "overwrite_output_dir": Drop("a run never deletes what it finds in its folder"),
    "save_safetensors": Drop("weights are always saved as safetensors"),
    "fp16_backend": Drop("there is one backend"),
    "half_precision_backend": Drop("there is one backend"),
    "fp16_opt_level": Drop("apex is not used"),
    "use_mps_device": Drop("the device is found"),
    "use_ipex": Drop("oneDNN is part of torch"),
    "jit_mode_eval": Drop("torch.jit is retired"),
    "dispatch_batches": Drop("set accelerator_config instead"),
    "split_batches": Drop("set accelerator_config instead"),
    "include_inputs_for_metrics": Drop("set include_for_metrics=['inputs'] instead"),
    "dataset_batch_size": Drop("rows are rendered as they come"),
    "num_of_sequences": Drop("packing needs no estimate"),
    "chars_per_token": Drop("packing needs no estimate"),
}

# Both names are fields of the newest transformers, and the old one warns; either is taken here.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_SLOW_ON_CPU = ("8bit", "4bit", "paged")


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _for_this_machine(where: str, values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Fill in what a machine without a GPU needs, and answer what it cannot do."""
    values.setdefault("report_to", "none")
    for old, new in _RENAMED.items():
        if old in values and new in known:
            values[new] = values.pop(old)
    if facts().gpus and not values.get("use_cpu"):
        return values
    values["use_cpu"] = True
    values["bf16"] = bool(values.get("bf16") or False)
    checkpointing = "activation_checkpointing"
    values.setdefault(checkpointing if checkpointing in known else "gradient_checkpointing", False)
    values.setdefault("dataloader_pin_memory", False)
    if values.get("fp16"):
        logger.warning("%s: fp16 is far slower than float32 on a CPU and is not used", where)
        values["fp16"] = False
    optimizer = str(getattr(values.get("optim"), "value", values.get("optim") or ""))
    if any(word in optimizer for word in _SLOW_ON_CPU):
        # bitsandbytes' 8-bit optimizers step in Python on a CPU: 100 times the time of fused AdamW.
        logger.warning("%s: '%s' needs a GPU; using adamw_torch_fused", where, optimizer)
        values["optim"] = "adamw_torch_fused"
    return values


class TrainingArguments(transformers.TrainingArguments):
    """transformers' ``TrainingArguments``; see the module for what is different.

    Args:
        loraplus_lr_ratio: Learning rate of every LoRA B, as a multiple of A's (LoRA+).

    Raises:
        ArgumentError: FG-ARG-001 for a name that no version has.
        ConfigError: FG-ADAPT-061, a ratio that is not above 0.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        loraplus_lr_ratio: float | None = None,
        **values: Any,
    ):
        self.loraplus_lr_ratio = check_ratio(loraplus_lr_ratio)
        where = type(self).__name__
        known = _names(transformers.TrainingArguments)
        values = _for_this_machine(where, translate(where, values, known, LEGACY), known)
        super().__init__(output_dir=output_dir, **values)


class SFTConfig(trl.SFTConfig):
    """trl's ``SFTConfig``; see the module for what is different.

    Args:
        share_prefix: Compute what all rows of a batch begin with (a system prompt, say) once.
        loraplus_lr_ratio: Learning rate of every LoRA B, as a multiple of A's (LoRA+).

    Raises:
        ArgumentError: FG-ARG-001 for a name that no version has.
        ConfigError: FG-ADAPT-061, a ratio that is not above 0.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        share_prefix: bool = True,
        loraplus_lr_ratio: float | None = None,
        **values: Any,
    ):
        self.share_prefix = share_prefix
        self.loraplus_lr_ratio = check_ratio(loraplus_lr_ratio)
        where = type(self).__name__
        known = _names(trl.SFTConfig)
        values = _for_this_machine(where, translate(where, values, known, LEGACY), known)
        super().__init__(output_dir=output_dir, **values)

    @classmethod
    def from_arguments(cls, args: transformers.TrainingArguments, **more: Any) -> SFTConfig:
        """Take over every setting of other arguments, stock or ours.

        Args:
            args: The arguments to copy.
            more: Settings that go with the trainer in older scripts, ``packing`` say.
        """
        names = {field.name for field in dataclasses.fields(args) if field.init}
        values = {name: getattr(args, name) for name in names & _names(trl.SFTConfig)}
        values["share_prefix"] = getattr(args, "share_prefix", True)
        values["loraplus_lr_ratio"] = getattr(args, "loraplus_lr_ratio", None)
        return cls(**{**values, **more})
