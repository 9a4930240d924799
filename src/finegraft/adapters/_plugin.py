"""Our own methods as methods of peft: its tables, its tuner, its layers.

What: ``register`` adds bottleneck, BitFit and head-only tuning to peft's tables, and ``Layer`` and
``Tuner`` carry what these methods share, so that saving, loading, switching, disabling, deleting
and merging are peft's own code. How: peft looks methods up by a string enumeration that it closes
to others; members of an enumeration of our own are equal to their strings, so the look-ups find
them. Constraint: no entry of peft's is changed, and nothing is added before ``register`` is called.
Trade-off: plain peft opens such a folder only after ``import finegraft.peft_plugin``.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType, get_peft_model
from peft import mapping as tables
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from finegraft.adapters._contract import SEQUENCE, TOKEN
from finegraft.adapters.lora import check_targets
from finegraft.core.errors import AdapterError, did_you_mean

# Names that peft gives the new head of a classifier; it trains and is saved with every adapter.
HEADS = ("classifier", "score")


class OwnPeftType(str, enum.Enum):  # noqa: UP042, peft splits str() of a member at its dot
    """Values of ``peft_type`` that peft itself does not have."""

    BOTTLENECK = "BOTTLENECK"
    BITFIT = "BITFIT"
    HEAD = "HEAD"


def register() -> None:
    """Add our methods to peft's tables; calling it again changes nothing.

    Raises:
        AdapterError: FG-ADAPT-020, this peft has a method of the same name.
    """
    from finegraft.adapters import bitfit, bottleneck, head

    for kind, config, tuner in (
        (OwnPeftType.BOTTLENECK, bottleneck.BottleneckConfig, bottleneck.BottleneckModel),
        (OwnPeftType.BITFIT, bitfit.BitFitConfig, bitfit.BitFitModel),
        (OwnPeftType.HEAD, head.HeadConfig, head.HeadModel),
    ):
        there = tables.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, config)
        if there is not config:
            raise AdapterError(
                "FG-ADAPT-020",
                f"peft has a method {kind.value} of its own ({there.__module__}.{there.__name__})",
                allowed="a peft without it",
                fix="install a peft version that finegraft names as tested, or use method='lora'",
            )
        tables.PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
        tables.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix


def register_for(folder: Path) -> None:
    """Call ``register`` when the adapter saved in ``folder`` is of one of our methods."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # peft says what is wrong with it
    if isinstance(config, dict) and config.get("peft_type") in {kind.value for kind in OwnPeftType}:
        register()


def configure(kind: type[PeftConfig], method: str, settings: dict[str, Any]) -> Any:
    """Return ``kind(**settings)``.

    Raises:
        AdapterError: FG-ADAPT-021 unknown setting; FG-ADAPT-004 a value that peft refuses.
    """
    known = {field.name for field in dataclasses.fields(kind)} - {"peft_type"}
    unknown = sorted(set(settings) - known)
    if unknown:
        own = known - {field.name for field in dataclasses.fields(PeftConfig)}
        raise AdapterError(
            "FG-ADAPT-021",
            f"method '{method}' has no setting '{unknown[0]}'",
            allowed=", ".join(sorted(own)),
            fix=did_you_mean(unknown[0], own),
        )
    try:
        return kind(**settings)
    except AdapterError:
        raise
    except (ValueError, TypeError) as error:
        raise _refused(method, error) from error


def attach(
    kind: type[PeftConfig],
    method: str,
    model: nn.Module,
    task_type: str,
    adapter_name: str,
    settings: dict[str, Any],
) -> Any:
    """Return ``model`` with a new adapter of one of our methods.

    Args:
        kind: The configuration of the method.
        settings: Its fields.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target; those of ``configure`` and ``wrap``.
    """
    register()
    config: Any = configure(kind, method, {"task_type": TaskType(task_type), **settings})
    if config.target_modules not in (None, DUMMY_TARGET_MODULES):
        check_targets(model, config.target_modules)
    return wrap(model, config, method, adapter_name)


def wrap(model: nn.Module, config: PeftConfig, method: str, adapter_name: str) -> Any:
    """Return ``model`` in peft's wrapper with a new adapter.

    Raises:
        AdapterError: that of the method, FG-ADAPT-004, peft refuses, or FG-ADAPT-028, a quantized
            head.
    """
    _check_heads(model, config)
    try:
        return get_peft_model(model, config, adapter_name=adapter_name)
    except AdapterError:
        raise
    except (ValueError, TypeError) as error:
        raise _refused(method, error) from error


def _check_heads(model: nn.Module, config: Any) -> None:
    """Prove that what trains whole has weights that can; peft would stop halfway."""
    wanted = tuple(config.modules_to_save or ())
    if config.task_type in (SEQUENCE, TOKEN):
        wanted += HEADS
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        quantized = isinstance(weight, torch.Tensor) and not weight.is_floating_point()
        if quantized and any(part.endswith(wanted) for part in path.split(".")):
            raise AdapterError(
                "FG-ADAPT-028",
                f"{path} must train with the adapter, but its weights are quantized",
                allowed="a quantized base whose head was left as it is",
                fix="load with FastClassifier, or a BitsAndBytesConfig with "
                f"llm_int8_skip_modules=['{path.split('.')[-1]}']",
            )


def _refused(method: str, error: Exception) -> AdapterError:
    return AdapterError(
        "FG-ADAPT-004",
        f"peft refuses these settings of '{method}': {error}",
        fix="correct the setting that it names, or leave it out for its default",
    )


class Layer(nn.Module, BaseTunerLayer):
    """Around one module of the base; dictionaries by adapter name hold what is added to it."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter: Any = []
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    def add(self, name: str, config: Any, widths: tuple[int, int]) -> None:
        """Make the parameters of the adapter ``name``; ``widths`` are those of input and output."""
        raise NotImplementedError

    def applied(self) -> list[str]:
        """Names of the adapters that a forward applies."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        have = getattr(self, self.adapter_layer_names[0])
        return [] if self.merged else [name for name in self.active_adapters if name in have]

    def place(self, name: str) -> None:
        """Bring the adapter ``name`` to the device of the base."""
        device = next(self.base_layer.parameters()).device
        self._move_adapter_to_device_of_base_layer(name, device)


class Tuner(BaseTuner):
    """Wraps the targets that the configuration names, or those of ``default_targets``."""

    tuner_layer_cls: type[Layer]

    def default_targets(self, config: Any, model: nn.Module) -> Any:
        """Return the value of ``target_modules`` for a configuration without one."""
        raise NotImplementedError

    def layer_for(self, module: nn.Module, key: str) -> Layer:
        """Return the layer to put around ``module``."""
        return self.tuner_layer_cls(module)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = self.default_targets(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, Layer) else self.layer_for(target, current_key)
        layer.add(adapter_name, peft_config, self._widths(layer.get_base_layer()))
        layer.place(adapter_name)
        setattr(parent, target_name, layer)

    def _widths(self, base: Any) -> tuple[int, int]:
        """Input and output width of a linear layer; of a half of a layer, the hidden size."""
        if type(base).__name__ == "Conv1D":
            return base.nx, base.nf
        if hasattr(base, "in_features") and hasattr(base, "out_features"):
            return base.in_features, base.out_features
        hidden = self.model.config.get_text_config().hidden_size
        return hidden, hidden

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        setattr(parent, child_name, new_module)


def half(x: torch.Tensor) -> bool:
    """Whether ``x`` is in half precision, in which adapters in float32 compute without autocast."""
    return x.dtype in (torch.bfloat16, torch.float16)
