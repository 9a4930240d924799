"""Settings of a LoRA, checked against the model before anything is changed.

What: ``check`` refuses what peft would ignore without a word (a pattern that matches no layer, a
layer number that does not exist, biases that are not there) and what it could only do wrong. How:
every rule is one small function over the configuration and the layers that it would adapt.
Constraint: nothing here touches the model. Trade-off: a setting that could be read as harmless, a
rank pattern for a layer that is not adapted say, is an error too, because it is a typing mistake
more often than not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from finegraft.core.errors import AdapterError, did_you_mean, near
from finegraft.models import swap

STARTS = (
    "true", "false", "gaussian", "pissa", "pissa_niter_16", "olora", "eva", "loftq", "orthogonal",
    "mica",
)  # fmt: skip
# Starts that peft makes from data which it expects to find on the layers.
_PREPARED = {"corda": "covariances of the inputs", "lora_ga": "gradients of the whole weights"}
# Starts that read the dense weight, or write adapters in its dtype.
_DENSE = ("orthogonal", "mica")
_LINEAR_ONLY = ("pissa", "olora", "loftq", "orthogonal")
# Starts that are made from singular vectors or columns of the weight.
_FACTORED = ("pissa", "olora", "loftq", "mica")
_ALLOWED = {
    "pissa": "linear layers, not in 8 bits, and ranks up to the narrower side of each",
    "olora": "linear layers, not in 8 bits, and ranks up to the narrower side of each",
    "loftq": "linear layers, and ranks up to the narrower side of each",
    "mica": "a 16-bit or 32-bit base, and ranks up to the narrower side of each layer",
    "orthogonal": "linear layers of a 16-bit or 32-bit base, and even ranks",
}
_NITER = re.compile(r"pissa_niter_\d+")


def start_name(value: Any) -> bool | str:
    """Read ``init_lora_weights``; None is peft's default, words are not case-sensitive.

    Raises:
        AdapterError: FG-ADAPT-050 unknown, FG-ADAPT-051 one that is not made here.
    """
    if value is None or isinstance(value, bool):
        return True if value is None else value
    name = str(value).lower()
    if name in ("true", "false"):
        return name == "true"
    if name in _PREPARED:
        raise AdapterError(
            "FG-ADAPT-051",
            f"init_lora_weights='{name}', which needs {_PREPARED[name]} for every layer, in full "
            "size, before the adapter is made",
            allowed=", ".join(STARTS),
            fix="init_lora_weights='eva' starts from the data with less memory; 'pissa' needs none",
        )
    if name in STARTS or _NITER.fullmatch(name):
        return name
    raise AdapterError(
        "FG-ADAPT-050",
        f"init_lora_weights={value!r}",
        allowed=", ".join(STARTS),
        fix=did_you_mean(name, STARTS),
    )


def is_adaptable(module: nn.Module) -> bool:
    """Whether a LoRA can stand beside a module: linear, Conv1D, convolution or embedding."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def adapted(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` gives a LoRA to, by name."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if not is_adaptable(module):
            continue
        if config.target_modules == "all-linear":
            last = head is None and name.split(".")[0] in SEQ_CLS_HEAD_NAMES
            wanted = not (isinstance(module, nn.Embedding) or module is head or last)
        else:
            wanted = bool(check_target_module_exists(config, name))
        if wanted:
            found[name] = module
    return found


def check(model: nn.Module, config: LoraConfig, start: bool | str) -> None:
    """Prove that ``config`` can be followed on ``model``.

    Args:
        start: What ``start_name`` gave.

    Raises:
        AdapterError: FG-ADAPT-051 to FG-ADAPT-058.
    """
    layers = adapted(model, config)
    _check_patterns(layers, config)
    _check_start(model, layers, config, start)
    _check_dora(config)
    _check_biases(model, layers, config)
    _check_parameters(model, config)
    _check_saved(model, config)


def check_layers(model: nn.Module, wanted: list[int] | int | None, pattern: Any) -> None:
    """Prove that every layer number exists.

    Raises:
        AdapterError: FG-ADAPT-054 with the numbers that do.
    """
    if wanted is None:
        return
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [r"[^.]*"])
    found = set()
    for name, _ in model.named_modules():
        for one in patterns:
            match = re.match(rf"(?:^|.*?\.){one}\.(\d+)\.", name)
            found |= {int(match[1])} if match else set()
    missing = [n for n in numbers if n not in found]
    if missing or not numbers:
        known = f"0 to {max(found)}" if found else f"none: no list of layers called {pattern!r}"
        raise AdapterError(
            "FG-ADAPT-054",
            f"layers_to_transform={wanted!r}, but this {type(swap.core(model)).__name__} has no "
            f"layer {', '.join(map(str, missing)) or 'in an empty list'}",
            allowed=known,
            fix="leave layers_to_transform out for all layers"
            if found
            else "leave layers_pattern out; the list is found by itself",
        )


def _check_patterns(layers: dict[str, nn.Module], config: LoraConfig) -> None:
    """Raises AdapterError FG-ADAPT-053 for a pattern without a layer, or a rank below 1."""
    for setting, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        for key, value in (getattr(config, setting) or {}).items():
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers):
                lasts = {name.rsplit(".", 1)[-1] for name in layers}
                close = near(key.rsplit(".", 1)[-1], lasts)
                raise AdapterError(
                    "FG-ADAPT-053",
                    f"{setting} has {key!r}, which matches no adapted layer",
                    allowed="the end of a layer's name, or an expression for it: "
                    + ", ".join(sorted(lasts)),
                    fix=f"did you mean '{close}'?" if close else f"remove it from {setting}",
                )
            if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
                raise AdapterError(
                    "FG-ADAPT-053",
                    f"{setting} has {key!r}: {value!r}",
                    allowed="a rank of at least 1" if least else "a number, usually 8 to 64",
                    fix=f"{setting}={{{key!r}: 16}}",
                )


def _check_start(
    model: nn.Module, layers: dict[str, nn.Module], config: LoraConfig, start: bool | str
) -> None:
    """Raises AdapterError FG-ADAPT-051 for a start that these layers cannot have."""
    if isinstance(start, bool) or start in ("gaussian", "eva"):
        return
    kind = start.split("_")[0]
    found = None
    if kind in _LINEAR_ONLY:
        others = [n for n, m in layers.items() if isinstance(m, nn.Embedding | nn.Conv2d)]
        if others or config.target_parameters:
            where = others[0] if others else config.target_parameters[0]
            found = f"init_lora_weights='{start}' with a LoRA on {where}"
    if kind in _DENSE and getattr(swap.core(model), "is_quantized", False):
        found = f"init_lora_weights='{start}' on a quantized base, whose dtype it would take over"
    if kind in ("pissa", "olora") and getattr(swap.core(model), "is_loaded_in_8bit", False):
        found = f"init_lora_weights='{start}' on an 8-bit base, whose weights are not read back"
    ranks = {name: _rank(config, name) for name in layers}
    if kind == "orthogonal" and any(rank % 2 for rank in ranks.values()):
        found = f"init_lora_weights='{start}' with an odd rank"
    if kind in _FACTORED:
        small = next((n for n, m in layers.items() if ranks[n] > _narrow(m)), None)
        if small:
            found = f"init_lora_weights='{start}' with rank {ranks[small]} on {small}, whose "
            found += f"weight has rank {_narrow(layers[small])} at most"
    if found:
        raise AdapterError(
            "FG-ADAPT-051", found, allowed=_ALLOWED[kind], fix="leave init_lora_weights out"
        )


def _rank(config: LoraConfig, name: str) -> int:
    patterns = (config.rank_pattern or {}).items()
    found = (rank for key, rank in patterns if re.match(rf"(.*\.)?({key})$", name))
    return int(next(found, config.r))


def _narrow(module: Any) -> int:
    """The smaller side of a linear layer's weight."""
    sides = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return min(s for s in sides if s) if any(sides) else min(module.weight.shape)


def _check_dora(config: LoraConfig) -> None:
    """Raises AdapterError FG-ADAPT-055 where DoRA's magnitudes have no meaning."""
    if not config.use_dora:
        return
    found = None
    if config.target_parameters:
        found = "use_dora with target_parameters: the magnitude belongs to one weight matrix, and "
        found += "these parameters hold one for every expert"
    elif config.lora_bias:
        found = "use_dora with lora_bias: the bias is not part of the decomposed weight"
    if found:
        raise AdapterError(
            "FG-ADAPT-055", found, allowed="target_modules", fix="use_dora=False, or leave it out"
        )


def _check_biases(model: nn.Module, layers: dict[str, nn.Module], config: LoraConfig) -> None:
    """Raises AdapterError FG-ADAPT-056 for a bias setting that would train nothing."""
    if config.bias == "none":
        return
    choices = ("none", "lora_only", "all")
    if config.bias not in choices:
        raise AdapterError(
            "FG-ADAPT-056",
            f"bias={config.bias!r}",
            allowed=", ".join(choices),
            fix=did_you_mean(str(config.bias), choices),
        )
    if config.bias == "all":
        there = any("bias" in name for name, _ in model.named_parameters())
    else:
        there = any(getattr(module, "bias", None) is not None for module in layers.values())
    if not there:
        where = "no biases at all" if config.bias == "all" else "no bias on the adapted layers"
        raise AdapterError(
            "FG-ADAPT-056",
            f"bias='{config.bias}', but this {type(swap.core(model)).__name__} has {where}",
            allowed="bias='none' here",
            fix="leave bias out",
        )


def _check_parameters(model: nn.Module, config: LoraConfig) -> None:
    """Raises AdapterError FG-ADAPT-057 for ``target_parameters`` that are not there."""
    wanted = config.target_parameters or []
    every = [name for name, _ in model.named_parameters()]
    missing = [t for t in wanted if not any(n == t or n.endswith("." + t) for n in every)]
    if missing:
        stacked = {
            ".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if p.dim() == 3
        }
        raise AdapterError(
            "FG-ADAPT-057",
            f"target_parameters names {', '.join(map(repr, missing))}, which this "
            f"{type(swap.core(model)).__name__} does not have",
            allowed=", ".join(sorted(stacked)) or "the end of a parameter's name",
            fix=did_you_mean(missing[0], stacked) if stacked else "target_modules for its layers",
        )
    if wanted and config.lora_dropout:
        raise AdapterError(
            "FG-ADAPT-057",
            f"lora_dropout={config.lora_dropout} with target_parameters, whose update is added to "
            "the weight itself, where no input can be dropped",
            allowed="lora_dropout=0.0",
            fix="lora_dropout=0.0, or target_modules only",
        )


def _check_saved(model: nn.Module, config: LoraConfig) -> None:
    """Raises AdapterError FG-ADAPT-058 for ``modules_to_save`` that are not there."""
    names = [name for name, _ in model.named_modules() if name]
    saved: Iterable[str] = config.modules_to_save or []
    missing = [s for s in saved if not any(n == s or n.endswith("." + s) for n in names)]
    if missing:
        # The parts outside of the layers are what is usually trained whole.
        parts = sorted({n.rsplit(".", 1)[-1] for n in names if not re.search(r"\.\d+\.", n)})
        raise AdapterError(
            "FG-ADAPT-058",
            f"modules_to_save names {', '.join(map(repr, missing))}, which this "
            f"{type(swap.core(model)).__name__} does not have",
            allowed=", ".join(parts),
            fix=did_you_mean(missing[0], parts),
        )
