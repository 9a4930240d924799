"""Bottleneck adapters: a small two-layer network beside frozen layers.

What: ``up(f(down(h)))`` is added to the output ``h`` of a layer's halves, before the residual sum:
after attention and MLP (Houlsby) or after the MLP alone (Pfeiffer). With ``parallel`` it reads the
half's input instead. How: in series it wraps the output linear, in parallel the half itself; where
that is BERT's ``output``, which takes the input in again, the sum is made on that argument.
Constraint: ``up`` starts at zero, so a fresh adapter is exactly the identity; in half precision the
products run in the base's dtype from float32 master weights, as LoRA's do. Trade-off: the
non-linearity cannot be merged into the base, so it costs time in every call for ever.

Shapes: d hidden, m bottleneck.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import nn
from transformers.activations import ACT2FN

from finegraft.adapters import _plugin, _sites
from finegraft.adapters._contract import CAUSAL, Method
from finegraft.core.errors import AdapterError, did_you_mean

PLACEMENTS = ("houlsby", "pfeiffer")
NON_LINEARITIES = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "leaky_relu",
    "linear",
    "mish",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)
_NOT_MERGEABLE = "it has a non-linearity between its two matrices, which no linear layer can hold"


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of a bottleneck adapter.

    Args:
        placement: ``pfeiffer``, after the MLP; ``houlsby``, after attention as well.
        reduction_factor: Hidden size over bottleneck size.
        bottleneck_size: Width between the two matrices; None: from ``reduction_factor``.
        non_linearity: One of ``NON_LINEARITIES``.
        parallel: Read the input of attention or MLP instead of its output.
        scaling: Factor of what is added; He et al. found 4 best with ``parallel``.
        dropout: Probability on what the adapter reads, in training.
        target_modules: What to wrap instead: names or an expression for whole paths.
        exclude_modules: What to leave out of it.
        modules_to_save: Modules that train whole and are saved with the adapter.

    Raises:
        AdapterError: FG-ADAPT-022, a value is out of range.
    """

    placement: str = field(default="pfeiffer")
    reduction_factor: float = field(default=16)
    bottleneck_size: int | None = field(default=None)
    non_linearity: str = field(default="relu")
    parallel: bool = field(default=False)
    scaling: float = field(default=1.0)
    dropout: float = field(default=0.0)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _plugin.OwnPeftType.BOTTLENECK
        if self.placement not in PLACEMENTS:
            raise _choice("placement", self.placement, PLACEMENTS)
        if self.non_linearity not in NON_LINEARITIES:
            raise _choice("non_linearity", self.non_linearity, NON_LINEARITIES)
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise _range("bottleneck_size", self.bottleneck_size, "a whole number of at least 1")
        if not self.reduction_factor > 0:
            raise _range("reduction_factor", self.reduction_factor, "above 0, usually 2 to 64")
        if not 0 <= self.dropout < 1:
            raise _range("dropout", self.dropout, "at least 0 and below 1")


def _range(name: str, value: Any, allowed: str) -> AdapterError:
    return AdapterError("FG-ADAPT-022", f"{name}={value}", allowed=allowed, fix=f"leave out {name}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> AdapterError:
    return AdapterError(
        "FG-ADAPT-022",
        f"{name}={value!r}",
        allowed=", ".join(allowed),
        fix=did_you_mean(str(value), allowed),
    )


class BottleneckLayer(_plugin.Layer):
    """Adapters in series with a layer: each reads the output and adds to it.

    Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_scaling", "bottleneck_dropout", "bottleneck_activation")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()
        self.bottleneck_scaling: dict[str, float] = {}

    reads_input = False

    def add(self, name: str, config: BottleneckConfig, widths: tuple[int, int]) -> None:
        """Make the two matrices of ``name``, the second at zero."""
        width = widths[1]
        size = config.bottleneck_size or max(1, round(width / config.reduction_factor))
        down = nn.Linear(widths[0] if self.reads_input else width, size)
        up = nn.Linear(size, width)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_dropout[name] = nn.Dropout(config.dropout).train(self.training)
        self.bottleneck_activation[name] = ACT2FN[config.non_linearity]
        self.bottleneck_scaling[name] = float(config.scaling)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output [..., d] with what the adapters add to it."""
        out = self.base_layer(x, *args, **kwargs)
        for name in self.applied():
            out = out + self.added(name, out)
        return out

    def added(self, name: str, h: torch.Tensor) -> torch.Tensor:
        """What the adapter ``name`` adds, [..., d], for what it reads, [..., d]."""
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        dtype = h.dtype if _plugin.half(h) else down.weight.dtype
        inner = _linear(down, self.bottleneck_dropout[name](h).to(dtype))
        out = _linear(up, self.bottleneck_activation[name](inner))
        return (out * self.bottleneck_scaling[name]).to(h.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            AdapterError: FG-ADAPT-026.
        """
        raise _unmergeable()


class ParallelBottleneckLayer(BottleneckLayer):
    """Adapters beside attention or MLP: each reads the input and adds to the output.

    Source: He et al. 2021, arXiv:2110.04366.
    """

    reads_input = True

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        signature = inspect.signature(type(base_layer).forward)
        # BERT's ``output`` is given the half's input as a second argument and sums it in itself.
        self._adds_input = "input_tensor" in signature.parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's result, its first element [..., d] with what the adapters add."""
        names = self.applied()
        if not names:
            return self.base_layer(*args, **kwargs)
        if self._adds_input:
            values = [*args, *kwargs.values()]
            hidden, read = values
            return self.base_layer(hidden, read + sum(self.added(name, read) for name in names))
        read = args[0] if args else next(iter(kwargs.values()))
        out = self.base_layer(*args, **kwargs)
        if kwargs.get("first_token_only"):  # encoders that compute one token a row, see families
            read = kwargs["rows"].first(read)
        added = sum(self.added(name, read) for name in names)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its attention (its kind, its window) is the base's to say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _unmergeable() -> AdapterError:
    return AdapterError(
        "FG-ADAPT-026",
        f"a bottleneck adapter cannot be merged: {_NOT_MERGEABLE}",
        allowed="saving and loading it as an adapter folder",
        fix="keep the adapter beside its base, or train with method='lora', which can be merged",
    )


class BottleneckModel(_plugin.Tuner):
    """The base with bottleneck adapters in it."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def default_targets(self, config: BottleneckConfig, model: nn.Module) -> str:
        """Expression for the ends of MLP, and of attention under Houlsby; or for these halves."""
        sites = _sites.find(model, "bottleneck")
        names = [sites.mlp_block if config.parallel else sites.mlp]
        if config.placement == "houlsby":
            names.insert(0, sites.attention_block if config.parallel else sites.attention)
        return _sites.below_layers(*names)

    def layer_for(self, module: nn.Module, key: str) -> _plugin.Layer:
        """A layer in series or in parallel, as all adapters of the model are."""
        parallel = next(iter(self.peft_config.values())).parallel
        return (ParallelBottleneckLayer if parallel else BottleneckLayer)(module)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len({other.parallel for other in self.peft_config.values()}) > 1:
            raise AdapterError(
                "FG-ADAPT-027",
                f"a bottleneck adapter with parallel={config.parallel} beside one with "
                f"parallel={not config.parallel}",
                allowed="adapters of one kind on one model; their layers wrap different modules",
                fix=f"pass parallel={not config.parallel}, or load the base a second time",
            )

    def _check_merge_allowed(self) -> None:
        raise _unmergeable()


def attach(
    model: nn.Module,
    *,
    task_type: str = CAUSAL,
    adapter_name: str = "default",
    **settings: Any,
) -> Any:
    """Return ``model`` with a new bottleneck adapter.

    Args:
        settings: Fields of ``BottleneckConfig``.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target, FG-ADAPT-021 unknown setting, FG-ADAPT-022 value
            out of range, FG-ADAPT-025 unknown layout, FG-ADAPT-027 series and parallel together.
    """
    return _plugin.attach(BottleneckConfig, "bottleneck", model, task_type, adapter_name, settings)


METHOD = Method(
    summary="a small network after MLP (and attention): keeps the base, cannot be merged",
    attach=attach,
    peft_type=_plugin.OwnPeftType.BOTTLENECK.value,
    not_mergeable=_NOT_MERGEABLE,
    in_peft=False,
    variants={
        "houlsby": {"placement": "houlsby"},
        "pfeiffer": {"placement": "pfeiffer"},
        "parallel-adapter": {"parallel": True, "scaling": 4.0},
    },
)
