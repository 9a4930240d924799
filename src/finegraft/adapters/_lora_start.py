"""Starts of a LoRA that are made from the base's weights: PiSSA, OLoRA and LoftQ.

What: ``apply`` fills a fresh adapter. How: PiSSA and OLoRA train a part of the weight itself. Where
peft takes that part out of the base, here it stays: the adapter has twice the rank, its second half
is the same part with the opposite sign and never moves, so W - s B0 A0 + s B A is computed on the
untouched base. LoftQ starts at the best low-rank approximation of what quantization took away.
Constraint: no weight of the base changes, so disabling, several adapters, saving, resuming and
merging are those of any LoRA, a 4-bit base included, and plain peft opens the folder. Trade-off:
twice the side products while training (peft doubles the rank at saving instead, and until then its
base is not the base that others have); an unquantized base is rounded for LoftQ, because there is
no error to start from otherwise.

Sources: PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775; LoftQ, arXiv:2310.08659.
Shapes: o out, i in, r rank of the trained half.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from finegraft.core.errors import AdapterError, ModelError
from finegraft.kernels import nf4
from finegraft.models import quantize, swap, weights

logger = logging.getLogger(__name__)

Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, i] and B [o, r]


def doubles(start: bool | str) -> bool:
    """Whether an adapter with this start holds its beginning as a second half."""
    return isinstance(start, str) and start.split("_")[0] in ("pissa", "olora")


def doubled(fields: dict[str, Any]) -> dict[str, Any]:
    """LoRA settings for twice the rank with the same scale.

    Args:
        fields: Of peft's ``LoraConfig``; ``r``, ``lora_alpha`` and their patterns are changed.
    """
    factor = math.sqrt(2) if fields.get("use_rslora") else 2
    ranks = {key: 2 * rank for key, rank in (fields.get("rank_pattern") or {}).items()}
    alphas = {key: factor * a for key, a in (fields.get("alpha_pattern") or {}).items()}
    alpha = factor * fields.get("lora_alpha", 8)
    return {
        **fields,
        "r": 2 * fields["r"],
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
    }


@torch.no_grad()
def apply(model: nn.Module, adapter_name: str, start: str) -> None:
    """Give the fresh adapter of ``model`` the start ``start``.

    Args:
        model: A peft model whose adapter starts at zero; of twice the rank where ``doubles`` says.

    Raises:
        AdapterError: FG-ADAPT-052, LoftQ without the weights it needs.
    """
    if start == "loftq":
        _loftq(model, adapter_name)
        return
    for _, layer in _linear_layers(model, adapter_name):
        rank = layer.r[adapter_name] // 2
        a, b = _factors(start)(_dense(layer), rank, layer.scaling[adapter_name])
        _fill(layer, adapter_name, a, b)


def _linear_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def _dense(layer: Any) -> torch.Tensor:
    """The base weight [o, i] in float32."""
    weight = layer.get_base_layer().weight
    if getattr(weight, "quant_state", None) is not None:
        return nf4.dense(weight, dtype=torch.float32)
    return weight.float().t() if getattr(layer, "fan_in_fan_out", False) else weight.float()


def _factors(start: str) -> Callable[[torch.Tensor, int, float], Factors]:
    if start == "olora":
        return _first_of_qr
    steps = start.partition("_niter_")[2]
    if steps:
        return functools.partial(_largest_fast, steps=int(steps))
    return _largest


def _largest(weight: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The ``rank`` largest singular directions, so that ``scaling`` B A is that part of it."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _largest_fast(weight: torch.Tensor, rank: int, scaling: float, steps: int) -> Factors:
    """The same by ``steps`` rounds of subspace iteration from random vectors."""
    u, s, v = torch.svd_lowrank(weight, q=rank, niter=steps)
    root = (s / scaling).sqrt()
    return root[:, None] * v.t(), u * root


def _first_of_qr(weight: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The first orthogonal columns and their coefficients, whatever the scale, as in the paper."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _fill(layer: Any, adapter_name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Set the trained half to A, B and the still half to A, -B: together they are zero."""
    lora_a, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    lora_a.copy_(torch.cat([a, a]))
    lora_b.copy_(torch.cat([b, -b], 1))
    lora_a.register_hook(lambda gradient: _first_half(gradient, 0))
    lora_b.register_hook(lambda gradient: _first_half(gradient, 1))


def _first_half(gradient: torch.Tensor, axis: int) -> torch.Tensor:
    half = gradient.shape[axis] // 2
    gradient = gradient.clone()
    gradient.narrow(axis, half, half).zero_()
    return gradient


def check_loftq(model: nn.Module, config: dict[str, Any]) -> None:
    """Refuse what LoftQ cannot start from, before the adapter is made.

    Args:
        config: ``loftq_bits`` and ``loftq_iter``, as peft's ``LoftQConfig``.

    Raises:
        AdapterError: FG-ADAPT-052.
    """
    bits, rounds = config.get("loftq_bits", 4), config.get("loftq_iter", 1)
    if bits != 4 or getattr(swap.core(model), "is_loaded_in_8bit", False):
        raise _no_loftq(
            "LoftQ on 8 bits, whose error is too small to gain anything from"
            if bits == 8 or bits == 4
            else f"loftq_bits={bits}",
            "4 bits: loftq_bits=4 on a 16-bit base or one with load_in_4bit=True",
            "loftq_config={'loftq_bits': 4}, load_in_8bit=False",
        )
    if rounds != 1:
        raise _no_loftq(
            f"loftq_iter={rounds}: a second round changes the quantized weights, and the adapter "
            "would fit no base but that one",
            "loftq_iter=1",
            "loftq_config={'loftq_bits': 4, 'loftq_iter': 1}",
        )
    if _is_4bit(model):
        _originals(model)


def _no_loftq(found: str, allowed: str, fix: str) -> AdapterError:
    return AdapterError("FG-ADAPT-052", found, allowed=allowed, fix=fix)


def _is_4bit(model: nn.Module) -> bool:
    return bool(getattr(swap.core(model), "is_loaded_in_4bit", False))


def _loftq(model: nn.Module, adapter_name: str) -> None:
    """Low-rank factors of the quantization error of every layer; see the module."""
    read = _originals(model) if _is_4bit(model) else None
    for name, layer in _linear_layers(model, adapter_name):
        rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
        base = layer.get_base_layer()
        if read is None:
            whole = _dense(layer)
            rounded = quantize.rounded_to_4bit(whole)
            turned = rounded.t() if getattr(layer, "fan_in_fan_out", False) else rounded
            base.weight.data = turned.to(base.weight.dtype).contiguous()
        elif getattr(base.weight, "quant_state", None) is None:
            continue  # the quantizer left it as it is: there is no error
        else:
            rounded = _dense(layer)
            whole = read(name + ".weight", rounded.shape).to(rounded.device)
        a, b = _largest(whole - rounded, rank, scaling)
        layer.lora_A[adapter_name].weight.copy_(a)
        layer.lora_B[adapter_name].weight.copy_(b)
    if read is None:
        logger.warning(
            "LoftQ: the adapted layers now hold their 4-bit roundings; open the trained adapter on "
            "this base with load_in_4bit=True, which gives the same"
        )


def _originals(model: nn.Module) -> Callable[[str, torch.Size], torch.Tensor]:
    """Return a function that reads a weight as it was before the base was quantized.

    Raises:
        AdapterError: FG-ADAPT-052, the unquantized files are not there.
    """
    core = swap.core(model)
    folder = Path(str(getattr(core.config, "name_or_path", "")))
    needs = "the unquantized safetensors files of the base, beside its config.json"
    fix = "load the unquantized model with load_in_4bit=True, or leave init_lora_weights out"
    try:
        files = [f for f in weights.files(folder) if f.suffix == ".safetensors"]
    except ModelError as error:
        raise _no_loftq(f"LoftQ, but no weights are in '{folder}'", needs, fix) from error
    places = {key: file for file in files for key in _keys(file)}
    prefix = f"{core.base_model_prefix}."

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        names = (name, name.removeprefix(prefix), prefix + name)
        found = next((n for n in names if n in places), "")
        if not found:
            raise _no_loftq(f"LoftQ, but {folder} has no weight called {name}", needs, fix)
        with safe_open(str(places[found]), "pt") as file:
            weight = file.get_tensor(found)
        if weight.shape != shape:  # packed already
            raise _no_loftq(f"LoftQ, but {folder} holds quantized weights", needs, fix)
        return weight.float()

    if any(key.endswith(".absmax") or ".quant_state." in key for key in places) or not places:
        raise _no_loftq(f"LoftQ, but '{folder}' holds no unquantized weights", needs, fix)
    return read


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(str(file), "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise weights.damaged(file, str(error)) from error
