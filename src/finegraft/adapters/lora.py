"""LoRA: low-rank updates beside frozen linear layers (arXiv:2106.09685).

What: peft's LoRA with its config, its directories and its module names; its plain linear layers
run our fused function. How: ``FastLoraLinear`` is set as the class of each injected instance.
Constraint: whatever the fused function does not reproduce exactly (DoRA, dropout in training,
several active adapters, merged or disabled adapters, 8-bit bases) takes peft's own path in the same
call. Trade-off: those checks cost 2 us a call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from finegraft.adapters._contract import Method
from finegraft.core.errors import AdapterError, near
from finegraft.kernels.lora_group import Part, lora_group
from finegraft.models import swap

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_NAMES = re.compile(r"[\w\s,]+")  # "q_proj" or "q_proj, v_proj"; anything else is an expression


class _Fused:
    """Mixed into a LoRA linear of peft's: its plain case is one autograd function."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Same result as peft's layer; see ``refusal`` for what is left to it."""
        part = None if args or kwargs else self.lora_part(x)
        if part is None:
            return super().forward(x, *args, **kwargs)
        return lora_group(x, (part,))[0]

    def lora_part(self: Any, x: torch.Tensor) -> Part | None:
        """What this layer adds to a group of layers with the input ``x``; None: call it."""
        if self.refusal(x) is not None:
            return None
        name, base = self.active_adapters[0], self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return Part(base.weight, base.bias, a, b, self.scaling[name])

    def refusal(self: Any, x: torch.Tensor | None = None) -> str | None:
        """Return why this call takes peft's path, or None when it is fast."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1:
            return "disabled, merged or several adapters"
        name = active[0]
        if name not in self.lora_A or name in self.lora_variant:
            return "a LoRA variant"
        if self.lora_bias.get(name):
            return "a LoRA with bias"
        base = self.base_layer
        if not self._takes(base) or base.weight.requires_grad:
            return "the base is of another kind, not quantised yet, or trained"
        if base.bias is not None and base.bias.requires_grad:
            return "the base bias is trained"
        if self.training and getattr(self.lora_dropout[name], "p", 0.0) > 0.0:
            return "dropout in training"
        if x is not None and (x.dtype != self._precision(base) or _autocast_to(x) is not None):
            return "mixed precision"
        return None

    @staticmethod
    def _takes(base: nn.Module) -> bool:
        return type(base) is nn.Linear

    @staticmethod
    def _precision(base: Any) -> torch.dtype:
        return base.weight.dtype

    def extra_repr(self: Any) -> str:
        """Show peft's own options and whether the fused path is taken."""
        reason = self.refusal()
        return ", ".join(filter(None, [super().extra_repr(), f"fused={reason or True}"]))


class FastLoraLinear(_Fused, LoraLinear):
    """LoRA beside a plain linear layer."""

    stock_class = LoraLinear


@functools.cache
def _fast_classes() -> dict[type, type]:
    """Fast classes by the class of peft's that each replaces; 4-bit where bitsandbytes is."""
    found: dict[type, type] = {LoraLinear: FastLoraLinear}
    with contextlib.suppress(ImportError):
        from peft.tuners.lora.bnb import Linear4bit

        class FastLoraLinear4bit(_Fused, Linear4bit):
            """LoRA beside a 4-bit layer, made dense once for forward and once for backward."""

            stock_class = Linear4bit

            @staticmethod
            def _takes(base: Any) -> bool:
                state = getattr(base.weight, "quant_state", None)
                return state is not None and not getattr(state, "packing_format_for_cpu", False)

            @staticmethod
            def _precision(base: Any) -> torch.dtype:
                return base.compute_dtype or base.weight.quant_state.dtype

        found[Linear4bit] = FastLoraLinear4bit
    return found


def _autocast_to(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would compute ``x`` in, if that is another one."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    wanted = torch.get_autocast_dtype(kind)
    return None if wanted == x.dtype else wanted


def accelerate(model: nn.Module) -> int:
    """Swap every LoRA linear of ``model`` to its fast class; return how many are fast."""
    fast = _fast_classes()
    return sum(
        swap.swap(module, fast.get(type(module), type(module)))
        for module in model.modules()
        if type(module) in fast or type(module) in fast.values()
    )


def linear_names(model: nn.Module) -> dict[str, int]:
    """Last name parts of the linear layers that can take a LoRA, with how many there are."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if _is_linear(module) and module is not head:
            last = name.rsplit(".", 1)[-1]
            counts[last] = counts.get(last, 0) + 1
    return counts


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):  # bitsandbytes' quantized linears are subclasses
        return True
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def check_targets(model: nn.Module, targets: list[str] | str) -> None:
    """Prove that every target names at least one module.

    Raises:
        AdapterError: FG-ADAPT-001 with the model's own linear layers.
    """
    if targets == ALL_LINEAR:
        return
    every = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        missing = [] if any(_expression(targets).fullmatch(n) for n in every) else [targets]
    else:
        missing = [t for t in targets if not any(n == t or n.endswith("." + t) for n in every)]
    if missing:
        known = linear_names(model)
        close = near(missing[0], known)
        raise AdapterError(
            "FG-ADAPT-001",
            f"target_modules names {', '.join(map(repr, missing))}, which this "
            f"{type(model).__name__} does not have",
            allowed=", ".join(f"{name} ({count})" for name, count in known.items()),
            fix=(f"did you mean '{close}'? Or " if close else "")
            + f"pass target_modules='{ALL_LINEAR}'",
        )


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise AdapterError(
            "FG-ADAPT-004",
            f"target_modules is {text!r}: {error}",
            allowed="module names, a regular expression for whole module paths, or all-linear",
            fix=f"target_modules='{ALL_LINEAR}'",
        ) from error


def attach(
    model: nn.Module,
    *,
    r: int = 16,
    target_modules: list[str] | str | None = ALL_LINEAR,
    task_type: str = "CAUSAL_LM",
    adapter_name: str = "default",
    **settings: Any,
) -> nn.Module:
    """Return ``model`` wrapped by peft with a new LoRA whose plain layers are fast.

    Args:
        r: Rank, at least 1.
        target_modules: Names, a regular expression, or ``all-linear``.
        settings: Further fields of peft's ``LoraConfig``.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target, FG-ADAPT-002 rank below 1, FG-ADAPT-004 a
            value that peft refuses.
    """
    if r < 1:
        raise AdapterError(
            "FG-ADAPT-002",
            f"rank r={r}",
            allowed="a whole number of at least 1, usually 8, 16 or 32",
            fix="pass r=16",
        )
    targets = list(target_modules) if isinstance(target_modules, tuple | set) else target_modules
    targets = targets or ALL_LINEAR
    if isinstance(targets, str) and targets != ALL_LINEAR and _NAMES.fullmatch(targets):
        targets = [name.strip() for name in targets.split(",")]
    check_targets(model, targets)
    try:
        config = LoraConfig(r=r, target_modules=targets, task_type=TaskType(task_type), **settings)
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except (ValueError, TypeError) as error:
        raise AdapterError(
            "FG-ADAPT-004", f"peft refuses these LoRA settings: {error}", fix="see the reason above"
        ) from error
    accelerate(wrapped)
    return wrapped


METHOD = Method(
    summary="low-rank updates beside frozen linear layers; the default",
    attach=attach,
    peft_type="LORA",
    accelerate=accelerate,
    keys=("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora"),
    variants={
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa_niter_16"},
    },
)
