"""IA3: learned factors on keys, values and the MLP's inner activation (Liu et al. 2022).

What: peft's IA3 (arXiv:2205.05638) with its directories and classes, and with targets that follow
the paper on every layout of names that ``_sites`` lists. How: keys and values are scaled at their
output, the layer that ends the MLP at its input. Constraint: where query, key and value are one
projection (Phi-3, GPT-2) the query is scaled too. Trade-off: peft's own targets for BERT also scale
the input of the attention's output layer, and for several families the query instead of the key;
ours differ from them.
"""

from __future__ import annotations

import re
from typing import Any

from peft import IA3Config, IA3Model, TaskType
from torch import nn

from finegraft.adapters import _plugin, _sites
from finegraft.adapters._contract import CAUSAL, Method
from finegraft.adapters.lora import check_targets
from finegraft.core.errors import AdapterError
from finegraft.models import swap


class MergesOrSaysWhy:
    """Mixed into peft's tuner: quantized layers refuse to be merged with what to do instead."""

    def _check_merge_allowed(self: Any) -> None:
        """Raises AdapterError FG-ADAPT-076 on a quantized base."""
        if getattr(self.model, "is_quantized", False):
            raise AdapterError(
                "FG-ADAPT-076",
                "merging IA3 into a quantized base: its layers hold whole numbers, which factors "
                "would round once more",
                allowed="a 16-bit or 32-bit base, or a merge into 16 bits",
                fix="finegraft.adapters.merge_to_16bit(model).model",
            )
        super()._check_merge_allowed()  # type: ignore[misc]

    def _unload_and_optionally_merge(self: Any, merge: bool = True, *args: Any, **more: Any) -> Any:
        """The stock method of all tuners; peft's IA3 lets no quantized base go, merged or not."""
        if merge:
            self._check_merge_allowed()
        return super(IA3Model, self)._unload_and_optionally_merge(merge, *args, **more)


def accelerate(model: nn.Module) -> int:
    """Give peft's tuner its subclass; no layer is swapped, so none counts as fast."""
    for module in model.modules():
        if isinstance(module, IA3Model):
            swap.swap(module, swap.fast_class(MergesOrSaysWhy, IA3Model))
    return 0


def attach(
    model: nn.Module,
    *,
    task_type: str = CAUSAL,
    adapter_name: str = "default",
    target_modules: list[str] | str | None = None,
    feedforward_modules: list[str] | str | None = None,
    **settings: Any,
) -> Any:
    """Return ``model`` wrapped by peft with a new IA3.

    Args:
        target_modules: Names, or an expression for whole paths; None: keys, values, end of the MLP.
        feedforward_modules: Which of them are scaled at their input; None: those that end an MLP.
        settings: Further fields of peft's ``IA3Config``.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target, FG-ADAPT-004 a value that peft refuses,
            FG-ADAPT-021 unknown setting, FG-ADAPT-025 unknown layout.
    """
    values = {
        "task_type": TaskType(task_type),
        **targets(model, target_modules, feedforward_modules),
        **settings,
    }
    config = _plugin.configure(IA3Config, "ia3", values)
    wrapped = _plugin.wrap(model, config, "ia3", adapter_name)
    accelerate(wrapped)
    return wrapped


def targets(
    model: nn.Module,
    target_modules: list[str] | str | None = None,
    feedforward_modules: list[str] | str | None = None,
) -> dict[str, Any]:
    """Return both fields of ``IA3Config``, those that were not given taken from the layout.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target, FG-ADAPT-025 unknown layout.
    """
    if target_modules is None:
        sites = _sites.find(model, "ia3")
        target_modules = _sites.below_layers(sites.keys_values, sites.mlp)
        feedforward_modules = feedforward_modules or _sites.below_layers(sites.mlp)
    else:
        check_targets(model, target_modules)
        if feedforward_modules is None:
            feedforward_modules = _feedforward(model, target_modules)
    return {"target_modules": target_modules, "feedforward_modules": feedforward_modules}


def _feedforward(model: nn.Module, targets: list[str] | str) -> list[str] | str:
    """Those of ``targets`` that end an MLP of ``model``."""
    sites = _sites.match(model)
    if sites is None:
        return []
    ends = _sites.below_layers(sites.mlp)
    if isinstance(targets, str):
        return ends
    paths = [path for path, _ in model.named_modules() if re.fullmatch(ends, path)]
    return [t for t in targets if any(path == t or path.endswith("." + t) for path in paths)]


METHOD = Method(
    summary="factors on keys, values and the MLP: very few parameters, can be merged",
    attach=attach,
    peft_type="IA3",
    accelerate=accelerate,
    learning_rates={"causal": 1e-2, "classification": 1e-2},
)
