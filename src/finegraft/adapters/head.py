"""Head only: the last layer trains, the rest of the model stays as it is.

What: a copy of the classification head (``classifier``, ``score``), or of ``lm_head`` for a causal
model, trains and is saved as an adapter folder. How: peft's ``modules_to_save`` without any adapter
layer. Constraint: a tied ``lm_head`` is untied by its copy, the embedding stays frozen; merging
puts the copy in the head's place. Trade-off: features cannot change, so it is the floor that other
methods must beat, and an ``lm_head`` is large: vocabulary times hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from finegraft.adapters import _plugin
from finegraft.adapters._contract import CAUSAL, SEQUENCE, TOKEN, Method
from finegraft.core.errors import AdapterError


@dataclass
class HeadConfig(PeftConfig):
    """Settings of head-only tuning.

    Args:
        modules_to_save: Ends of the names of what trains; None: the head of the task.
        target_modules: Always none; peft wants the field.
    """

    modules_to_save: list[str] | None = field(default=None)
    target_modules: str = field(default=DUMMY_TARGET_MODULES)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _plugin.OwnPeftType.HEAD
        self.target_modules = DUMMY_TARGET_MODULES


class HeadModel(_plugin.Tuner):
    """The base with another head."""

    prefix = "head_"
    tuner_layer_cls = _plugin.Layer  # none is ever made

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        wanted = peft_config.modules_to_save or _heads(peft_config, model)
        paths = [path for path, _ in model.named_modules()]
        if not any(path.endswith(name) for path in paths for name in wanted):
            children = ", ".join(name for name, _ in model.named_children())
            raise AdapterError(
                "FG-ADAPT-028",
                f"this {type(model).__name__} has no head called {' or '.join(wanted)}",
                allowed=f"a model with a head; this one has: {children}",
                fix="load it for its task, or name the head: modules_to_save=['...']",
            )
        peft_config.modules_to_save = list(wanted)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """peft warns of a tied head here; training it apart from the embedding is the method."""

    def unload(self) -> nn.Module:
        """Return the base with its own head; peft would leave the trained one in its place."""
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the first that is left becomes active if it was."""
        was_active = adapter_name in self.active_adapters
        left = [name for name in self.peft_config if name != adapter_name]
        if was_active and left:
            self.set_adapter(left[0])
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if left:
            self.set_adapter(active)


def _heads(config: Any, model: Any) -> list[str]:
    """Names of the head that the task has."""
    if config.task_type in (SEQUENCE, TOKEN):
        return list(_plugin.HEADS)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [path for path, module in model.named_modules() if module is output]
    return found or list(_plugin.HEADS)


def attach(
    model: nn.Module,
    *,
    task_type: str = CAUSAL,
    adapter_name: str = "default",
    **settings: Any,
) -> Any:
    """Return ``model`` with a trainable copy of its head; nothing else trains.

    Args:
        settings: Fields of ``HeadConfig``.

    Raises:
        AdapterError: FG-ADAPT-021 unknown setting, FG-ADAPT-028 no such head.
    """
    return _plugin.attach(HeadConfig, "head", model, task_type, adapter_name, settings)


METHOD = Method(
    summary="only the classification head (or lm_head) trains: the floor to beat",
    attach=attach,
    peft_type=_plugin.OwnPeftType.HEAD.value,
    in_peft=False,
    learning_rates={"causal": 2e-4, "classification": 5e-3},
)
