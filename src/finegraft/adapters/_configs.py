"""Configurations under the names that scripts use, and ``get_peft_model`` that takes them all.

What: peft's configuration classes with the names of other years and guides translated
(``prefix_length``, ``task_type="text-generation"``), two for methods that peft does not have, and
``get_peft_model`` for any of them or peft's own. How: ours are subclasses of peft's, so stock code
takes them; a configuration becomes the settings of ``adapters.attach``, so the same checks run.
Constraint: a ``task_type`` that is not given is read off the model's class. Trade-off: the caller's
object is copied, so what peft fills in is in ``model.peft_config`` only.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import peft
from peft import PeftConfig, TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from torch import nn

from finegraft.adapters import _methods, _virtual
from finegraft.adapters._task import task_named, task_of
from finegraft.core.arguments import Rename, translate
from finegraft.core.errors import AdapterError
from finegraft.models import swap

_SAVED_ONLY = {"peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"}
_SAVED_ONLY |= {"base_model_name_or_path", "revision"}


class _Translated:
    """Mixed into peft's classes: keywords of other years and names of tasks are translated."""

    _renamed: dict[str, Rename] = {}  # noqa: RUF012, never written

    def __init__(self, **settings: Any):
        known = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        today = translate(type(self).__name__, settings, known, self._renamed)
        super().__init__(**{**today, "task_type": task_named(today.get("task_type"))})


class LoraConfig(_Translated, peft.LoraConfig):
    """peft's; ``target_modules`` may be left out for every model."""


LoRAConfig = LoraConfig


class IA3Config(_Translated, peft.IA3Config):
    """peft's."""


class PrefixTuningConfig(_Translated, peft.PrefixTuningConfig):
    """peft's; ``prefix_length`` is ``num_virtual_tokens``, which is 20 when neither is given.

    ``init_weights`` is "zero" unless it is given; see ``adapters.prefix``.
    """

    def __init__(self, **settings: Any):
        super().__init__(**{"init_weights": "zero", **settings})

    _renamed = {"prefix_length": Rename("num_virtual_tokens")}  # noqa: RUF012


class PromptTuningConfig(_Translated, peft.PromptTuningConfig):
    """peft's; ``prompt_length`` is ``num_virtual_tokens``, which is 20 when neither is given."""

    _renamed = {"prompt_length": Rename("num_virtual_tokens")}  # noqa: RUF012


class PromptEncoderConfig(_Translated, peft.PromptEncoderConfig):
    """peft's configuration of P-tuning; ``prompt_length`` as in ``PromptTuningConfig``."""

    _renamed = {"prompt_length": Rename("num_virtual_tokens")}  # noqa: RUF012


class _Named:
    """A method of ours with its settings."""

    method: str

    def __init__(self, *, task_type: Any = None, **settings: Any):
        self.task_type = task_named(task_type)
        self.settings = settings

    def __repr__(self) -> str:
        values = {"task_type": self.task_type, **self.settings}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


class AdapterConfig(_Named):
    """Bottleneck adapters: ``reduction_factor``, ``non_linearity`` and what else they take."""

    method = "bottleneck"


class BitFitConfig(_Named):
    """Biases only."""

    method = "bitfit"


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = "default") -> Any:
    """Return ``model`` with a new adapter; only the adapter trains, and a classifier's new head.

    Args:
        model: A transformers model, finegraft's or stock.
        peft_config: Any configuration of finegraft's or peft's; it is not changed.
        adapter_name: For models that are to carry several; see ``adapters.named``.

    Raises:
        AdapterError: FG-ADAPT-042 no task, FG-ADAPT-044 not a configuration, FG-ADAPT-045 a model
            that carries an adapter, FG-ADAPT-039 what peft refuses; and those of the method.
    """
    method, task, settings = described(model, peft_config)
    if method is not None:
        return _methods.attach(model, method, task_type=task, adapter_name=adapter_name, **settings)
    _methods.check_bare(model)
    config = copy.deepcopy(peft_config)
    config.task_type = TaskType(task)
    try:
        return peft.get_peft_model(model, config, adapter_name=adapter_name)
    except (ValueError, TypeError) as error:
        raise _virtual.refused_by_peft(error) from error


def described(model: nn.Module, config: Any) -> tuple[str | None, str, dict[str, Any]]:
    """Name of the method, task and settings that ``config`` stands for on ``model``.

    Returns:
        None for a method of peft's that has no file here; its settings are then empty.

    Raises:
        AdapterError: FG-ADAPT-042, FG-ADAPT-044; see ``get_peft_model``.
    """
    if isinstance(config, _Named):
        return config.method, config.task_type or task_of(model), dict(config.settings)
    if not isinstance(config, PeftConfig):
        raise AdapterError(
            "FG-ADAPT-044",
            f"a {type(config).__name__} where a configuration belongs",
            allowed="LoraConfig, AdapterConfig, PrefixTuningConfig, PromptTuningConfig, "
            "PromptEncoderConfig, BitFitConfig, IA3Config, or any configuration of peft's",
            fix="get_peft_model(model, LoraConfig(r=16))",
        )
    task = task_named(config.task_type) or task_of(model)
    name = _methods.name_of(config)
    settings = {} if name is None else _given(config)
    if name == "prefix":  # peft's default is not that of the method
        settings["init_weights"] = config.init_weights
    if name == "lora" and config.target_modules is None and not config.target_parameters:
        kind = getattr(swap.core(model).config, "model_type", None)
        settings["target_modules"] = USUAL_TARGETS.get(kind, "all-linear")
    return name, task, settings


def _given(config: PeftConfig) -> dict[str, Any]:
    """The fields of a configuration that were set to something else than their default."""
    fresh = type(config)()
    return {
        field.name: copy.deepcopy(value)
        for field in dataclasses.fields(config)
        if field.name not in _SAVED_ONLY
        and (value := getattr(config, field.name)) != getattr(fresh, field.name)
    }
