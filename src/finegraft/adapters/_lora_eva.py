"""EVA: a LoRA that starts at the directions in which the layers' inputs vary (arXiv:2410.07170).

What: ``initialize_eva`` runs some batches through the model and sets every A and, where the data
ask for it, every rank. How: peft's own incremental decomposition, on the layers that see every
token [b, t, d]; one that sees a row (a pooler) keeps the plain start. Constraint: the base and the
output stay as they were, since B starts at zero; batches with fewer tokens than components are left
out, because peft would wait for them without end. Trade-off: the passes ask for hidden states, with
which the swapped families run their stock forward on padded batches, as peft's hooks expect.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from finegraft.core.errors import AdapterError
from finegraft.models import swap

logger = logging.getLogger(__name__)


class _Bare(nn.Module):
    """A model without its adapter's configuration, for which peft would choose the layers."""

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core

    def forward(self, **inputs: Any) -> Any:
        inputs.pop("labels", None)
        return self.core(**inputs, output_hidden_states=True)


def wants_data(model: nn.Module) -> bool:
    """Whether the active adapter was made with ``init_lora_weights='eva'`` and has not started."""
    active = getattr(model, "active_adapters", None)
    configs = getattr(model, "peft_config", None)
    if not configs or not active or callable(active) or len(active) != 1:
        return False
    if getattr(configs.get(active[0]), "init_lora_weights", None) != "eva":
        return False
    found = [p for n, p in model.named_parameters() if f".lora_B.{active[0]}." in n]
    return bool(found) and not any(p.detach().any() for p in found)


def initialize_eva(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, adapter_name: str | None = None
) -> nn.Module:
    """Start an EVA adapter from data; the trainers do this by themselves.

    Args:
        model: A peft model whose adapter has ``init_lora_weights='eva'``.
        batches: Padded batches with ``input_ids``, ``attention_mask`` and perhaps ``labels``; of
            causal models the labelled tokens count alone. A few hundred rows are enough.
        adapter_name: Default: the active one.

    Returns:
        The same model; layers whose inputs need no rank have lost their LoRA.

    Raises:
        AdapterError: FG-ADAPT-059, an adapter of another kind, or too few tokens.
    """
    name = adapter_name or getattr(model, "active_adapters", ["default"])[0]
    config = (getattr(model, "peft_config", None) or {}).get(name)
    if getattr(config, "init_lora_weights", None) != "eva":
        raise AdapterError(
            "FG-ADAPT-059",
            f"EVA for the adapter '{name}', which was not made for it",
            allowed="an adapter with init_lora_weights='eva'",
            fix="get_peft_model(model, init_lora_weights='eva') first",
        )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    least = round(max(ranks) * config.eva_config.rho)
    given = [_usable(batch) for batch in batches]
    kept = [batch for batch in given if _tokens(batch, config) >= least]
    if not kept:
        most = max((_tokens(batch, config) for batch in given), default=0)
        raise AdapterError(
            "FG-ADAPT-059",
            f"EVA with rank {max(ranks)} wants {least} tokens in a batch, and the largest of "
            f"{len(given)} has {most}",
            allowed="batches of at least rank x rho tokens (rho is 2 unless eva_config says so)",
            fix="larger batches, or a lower rank",
        )
    found = _directions(model, kept, config, name)
    initialize_lora_eva_weights(model, eva_state_dict=found, adapter_name=name)
    cast_adapter_dtype(model, name)  # layers of a new rank come in the base's precision
    return model


def _directions(
    model: Any, batches: list[dict[str, Any]], config: Any, name: str
) -> dict[str, torch.Tensor]:
    """The new A [rank, in] of every layer that sees tokens, under its name in ``model``."""
    bare = _Bare(swap.core(model))
    wanted = copy.copy(config)
    wanted.layers_to_transform = wanted.exclude_modules = wanted.modules_to_save = None
    ranks = (config.rank_pattern or {}).items()
    wanted.rank_pattern = {rf"{key}\.base_layer": rank for key, rank in ranks}
    with model.disable_adapter():
        wanted.target_modules = _token_layers(bare, batches[0], name)
        found = get_eva_state_dict(bare, batches, peft_config=wanted, show_progress_bar=False)
    return {
        "base_model.model." + key.removeprefix("core.").removesuffix(".base_layer"): a
        for key, a in found.items()
    }


@torch.no_grad()
def _token_layers(bare: nn.Module, batch: dict[str, Any], name: str) -> set[str]:
    """Names of the base layers with a LoRA whose input is [b, t, d]."""
    seen: dict[str, bool] = {}
    shape = batch["input_ids"].shape
    handles = [
        module.base_layer.register_forward_pre_hook(
            lambda _, args, key=key: seen.__setitem__(key, args[0].shape[:-1] == shape)
        )
        for key, module in bare.named_modules()
        if name in getattr(module, "lora_A", ())
    ]
    training = {module: module.training for module in bare.modules()}
    try:
        bare.eval()(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    others = [key.removeprefix("core.") for key, per_token in seen.items() if not per_token]
    if others:
        logger.info("EVA: %s see rows and not tokens; their LoRA starts plainly", ", ".join(others))
    return {f"{key}.base_layer" for key, per_token in seen.items() if per_token}


def _usable(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a padded batch; labels only where every token has one."""
    kept = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if "labels" in kept and kept["labels"].shape != kept["input_ids"].shape:
        del kept["labels"]
    return kept


def _tokens(batch: dict[str, Any], config: Any) -> int:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if config.eva_config.use_label_mask and "labels" in batch:
        mask = mask & (batch["labels"] != config.eva_config.label_mask_value)
    return int(mask.sum())
