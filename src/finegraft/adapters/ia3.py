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

from peft import IA3Config, TaskType
from torch import nn

from finegraft.adapters import _plugin, _sites
from finegraft.adapters._contract import CAUSAL, Method
from finegraft.adapters.lora import check_targets


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
    return _plugin.wrap(model, config, "ia3", adapter_name)


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
    learning_rates={"causal": 1e-2, "classification": 1e-2},
)
