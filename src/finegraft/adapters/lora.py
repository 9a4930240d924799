"""LoRA: low-rank updates beside frozen linear layers (arXiv:2106.09685).

What: peft's LoRA with its config, its directories and its module names; its plain linear layers
run our fused function. How: ``FastLoraLinear`` is set as the class of each injected instance; the
settings are checked in ``_lora_checks``, starts that come from the weights are in ``_lora_start``,
the one that comes from the data in ``_lora_eva``. Constraint: whatever the fused function does not
reproduce exactly (DoRA, dropout in training, several active adapters, merged or disabled adapters,
8-bit bases) takes peft's own path in the same call. Trade-off: those checks cost 2 us a call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from finegraft.adapters import _lora_checks, _lora_start
from finegraft.adapters._contract import Method
from finegraft.adapters._lora_eva import initialize_eva, wants_data
from finegraft.core.errors import AdapterError, near
from finegraft.kernels.lora_group import Part, lora_group
from finegraft.models import quantize, swap

logger = logging.getLogger(__name__)

__all__ = [
    "ALL_LINEAR",
    "METHOD",
    "FastLoraLinear",
    "accelerate",
    "attach",
    "check_targets",
    "initialize_eva",
    "linear_names",
    "wants_data",
]

ALL_LINEAR = "all-linear"
_NAMES = re.compile(r"[\w\s,]+")  # "q_proj" or "q_proj, v_proj"; anything else is an expression


class _OwnCopy:
    """Mixed into the LoRA of an embedding or a head whose weight both of them share.

    peft adds an update to the weight in place, which would change the other one too: input and
    output of a merged model were wrong. Here the layer merges into a copy, and unmerging puts the
    shared weight back, bit for bit.
    """

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """peft's merge, into a weight of this layer's own."""
        base = self.get_base_layer()
        if not self.merged and getattr(self, "shares_weight", False):
            self.shared_weight = [base.weight]  # in a list, so that it is no parameter here
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        super().merge(*args, **kwargs)

    def unmerge(self: Any) -> None:
        """peft's unmerge, or the shared weight itself."""
        if getattr(self, "shared_weight", None) is None:
            super().unmerge()
            return
        self.merged_adapters.clear()
        self.get_base_layer().weight = self.shared_weight.pop()
        self.shared_weight = None


class FastLoraEmbedding(_OwnCopy, LoraEmbedding):
    """LoRA beside an embedding; runs peft's own path."""

    stock_class = LoraEmbedding


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


class FastLoraLinear(_OwnCopy, _Fused, LoraLinear):
    """LoRA beside a plain linear layer."""

    stock_class = LoraLinear


@functools.cache
def _fast_classes() -> dict[type, type]:
    """Fast classes by the class of peft's that each replaces; 4-bit where bitsandbytes is."""
    found: dict[type, type] = {LoraLinear: FastLoraLinear, LoraEmbedding: FastLoraEmbedding}
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

            def merge(self: Any, *args: Any, **kwargs: Any) -> None:
                """peft's, which asks bitsandbytes for the dense weight."""
                _require_readable(self.base_layer.weight)
                super().merge(*args, **kwargs)

        found[Linear4bit] = FastLoraLinear4bit
    return found


def _require_readable(weight: Any) -> None:
    """Raises AdapterError FG-ADAPT-074 where merging in place would make the weights wrong."""
    if quantize.misread(weight):
        raise AdapterError(
            "FG-ADAPT-074",
            f"merging into a 4-bit layer {tuple(weight.quant_state.shape)}, whose rows end inside "
            f"a block of {weight.quant_state.blocksize}: bitsandbytes misreads it on a CPU",
            allowed="rows of whole blocks, or a merge into 16 bits",
            fix="finegraft.adapters.merge_to_16bit(model).model",
        )


def _autocast_to(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would compute ``x`` in, if that is another one."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    wanted = torch.get_autocast_dtype(kind)
    return None if wanted == x.dtype else wanted


def accelerate(model: nn.Module) -> int:
    """Swap every LoRA layer of ``model`` to its fast class; return how many there are."""
    fast = _fast_classes()
    _note_shared(model)
    return sum(
        swap.swap(module, fast.get(type(module), type(module)))
        for module in model.modules()
        if type(module) in fast or type(module) in fast.values()
    )


def _note_shared(model: nn.Module) -> None:
    """Tell the LoRA of an embedding or head whether its weight is the other's too."""
    core = swap.core(model)
    if not hasattr(core, "get_input_embeddings") or not hasattr(core, "get_output_embeddings"):
        return
    try:
        ends = [core.get_input_embeddings(), core.get_output_embeddings()]
    except NotImplementedError:  # transformers' answer for a model without an input embedding
        return
    bases = [end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends]
    weights = [getattr(getattr(b, "original_module", b), "weight", None) for b in bases]
    shared = weights[0] is not None and weights[0] is weights[1]
    for end in ends:
        if isinstance(end, LoraLinear | LoraEmbedding) and not end.merged:
            end.shares_weight = shared


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
    init_lora_weights: bool | str | None = None,
    **settings: Any,
) -> nn.Module:
    """Return ``model`` wrapped by peft with a new LoRA whose plain layers are fast.

    Args:
        r: Rank, at least 1.
        target_modules: Names, a regular expression, or ``all-linear``; an empty list together with
            ``target_parameters`` for those alone.
        init_lora_weights: None or True: B at zero. ``gaussian``, ``orthogonal``, ``pissa``,
            ``pissa_niter_<n>``, ``olora``, ``loftq``, ``eva`` (see ``initialize_eva``), ``mica``.
        settings: Further fields of peft's ``LoraConfig``.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target, FG-ADAPT-002 rank below 1, FG-ADAPT-004 a
            value that peft refuses, FG-ADAPT-050 to FG-ADAPT-058 a setting that this model or
            another setting does not allow.
    """
    if r < 1:
        raise AdapterError(
            "FG-ADAPT-002",
            f"rank r={r}",
            allowed="a whole number of at least 1, usually 8, 16 or 32",
            fix="pass r=16",
        )
    start = _lora_checks.start_name(init_lora_weights)
    targets = _targets(model, target_modules, settings)
    fields = {"r": r, "target_modules": targets, **_plain(settings)}
    if targets == ALL_LINEAR and task_type != "CAUSAL_LM":
        fields.setdefault("exclude_modules", _heads(model))
    try:
        config = _config(model, fields, task_type, start)
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except (ValueError, TypeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            "FG-ADAPT-004",
            f"peft refuses these LoRA settings: {error}",
            fix="correct the setting that it names, or leave it out for its default",
        ) from error
    if start == "loftq" or _lora_start.doubles(start):
        _lora_start.apply(wrapped, adapter_name, str(start))
    accelerate(wrapped)
    return wrapped


def _targets(
    model: nn.Module, given: list[str] | str | None, settings: dict[str, Any]
) -> list[str] | str:
    """Read ``target_modules`` and prove that it and the layer numbers exist."""
    targets = list(given) if isinstance(given, tuple | set | list) else given
    if not targets:
        targets = [] if settings.get("target_parameters") else ALL_LINEAR
    if isinstance(targets, str) and targets != ALL_LINEAR and _NAMES.fullmatch(targets):
        targets = [name.strip() for name in targets.split(",")]
    check_targets(model, targets)
    layers = settings.get("layers_to_transform")
    _lora_checks.check_layers(model, layers, settings.get("layers_pattern"))
    if layers is not None and targets == ALL_LINEAR:
        targets = list(linear_names(model))  # peft counts layers for names only
    return targets


def _heads(model: nn.Module) -> list[str] | None:
    """Linear layers of a classifier's head, which train whole and cannot carry a LoRA as well."""
    found = [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and any(p.endswith(("classifier", "score")) for p in name.split("."))
    ]
    return found or None


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with peft's own defaults for what is empty."""
    optional = ("modules_to_save", "layers_pattern", "target_parameters", "loftq_config")
    fields = {k: v for k, v in settings.items() if k not in optional or v}
    if isinstance(fields.get("modules_to_save"), str):
        fields["modules_to_save"] = [fields["modules_to_save"]]
    return fields


def _config(
    model: nn.Module, fields: dict[str, Any], task_type: str, start: bool | str
) -> LoraConfig:
    """peft's configuration, checked against the model; a start of our own is not named in it."""
    loftq = fields.pop("loftq_config", {})
    task = TaskType(task_type)
    plain = True if start == "loftq" else start  # whose settings peft wants, and are checked below
    config = LoraConfig(task_type=task, **{**fields, "init_lora_weights": plain})
    _lora_checks.check(model, config, start)
    if start == "loftq":
        _lora_start.check_loftq(model, loftq if isinstance(loftq, dict) else vars(loftq))
        start = True
    elif _lora_start.doubles(start):
        fields = _lora_start.doubled(fields)
        start = True
    return LoraConfig(task_type=task, **{**fields, "init_lora_weights": start})


METHOD = Method(
    summary="low-rank updates beside frozen linear layers; the default",
    attach=attach,
    peft_type="LORA",
    accelerate=accelerate,
    keys=(
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "modules_to_save",
    ),
    variants={
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa_niter_16"},
        "olora": {"init_lora_weights": "olora"},
        "eva": {"init_lora_weights": "eva"},
    },
)
