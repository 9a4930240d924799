"""BitFit: only biases train (Ben Zaken et al. 2021, arXiv:2106.10199).

What: each adapter is a difference to the biases that a model's linear and layer-norm modules have;
the biases themselves stay frozen. How: a plain linear or layer norm computes with bias + difference
in one call, any other module (4-bit, 8-bit, Conv1D) gets the difference added to its output.
Constraint: merging writes the very bias that the forward computed with, so plain modules give the
same bits merged and unmerged; the kept original makes unmerging exact; quantized weights are never
touched. Trade-off: modules with a difference leave the fused paths (one product for q, k and v;
sum and norm in one), because these give biases no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from finegraft.adapters import _plugin
from finegraft.adapters._contract import CAUSAL, Method
from finegraft.core.errors import AdapterError


@dataclass
class BitFitConfig(PeftConfig):
    """Settings of BitFit.

    Args:
        target_modules: Modules whose biases train, by names or an expression for whole paths; None:
            every linear and layer norm that has one, but for heads.
        exclude_modules: What to leave out of it.
        modules_to_save: Modules that train whole and are saved with the adapter.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _plugin.OwnPeftType.BITFIT


class BitFitLayer(_plugin.Layer):
    """A module whose bias is its own plus the active differences."""

    adapter_layer_names = ("bitfit_delta",)

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.bitfit_delta = nn.ParameterDict()
        self._original: torch.Tensor | None = None

    def add(self, name: str, config: BitFitConfig, widths: tuple[int, int]) -> None:
        """Make the difference ``name``, at zero."""
        self.bitfit_delta[name] = nn.Parameter(torch.zeros_like(self.base_layer.bias.detach()))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output with the biases of the active adapters."""
        names, base = self.applied(), self.base_layer
        if not names:
            return base(x, *args, **kwargs)
        plain = not (args or kwargs or base._forward_hooks or base._forward_pre_hooks)
        if plain and type(base) is nn.Linear:
            return F.linear(x, base.weight, self._bias(base.bias, names))
        if plain and type(base) is nn.LayerNorm:
            bias = self._bias(base.bias, names)
            return F.layer_norm(x, base.normalized_shape, base.weight, bias, base.eps)
        out = base(x, *args, **kwargs)
        return out + self._sum(names).to(out.dtype)

    def _sum(self, names: list[str]) -> torch.Tensor:
        total = self.bitfit_delta[names[0]]
        for name in names[1:]:
            total = total + self.bitfit_delta[name]
        return total

    def _bias(self, bias: torch.Tensor, names: list[str]) -> torch.Tensor:
        return (bias + self._sum(names)).to(bias.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the differences into the base's bias.

        Args:
            safe_merge: Refuse a bias that is not finite.

        Raises:
            AdapterError: FG-ADAPT-029, with ``safe_merge`` a merged bias is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.bitfit_delta]
        if not names:
            return
        base = self.base_layer
        original = base.bias.detach().clone() if self._original is None else self._original
        merged = self._bias(original, [*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise AdapterError(
                "FG-ADAPT-029",
                f"merging {', '.join(names)} gives a bias that is not finite",
                allowed="an adapter whose training did not diverge",
                fix="train it again with a lower learning rate",
            )
        self._original = original
        base.bias.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base its own bias back, to the bit."""
        if self._original is not None:
            self.base_layer.bias.data = self._original
        self._original = None
        self.merged_adapters.clear()


class BitFitModel(_plugin.Tuner):
    """The base with differences to its biases."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def default_targets(self, config: BitFitConfig, model: nn.Module) -> set[str]:
        """Paths of all linears and layer norms with a bias, heads left out; peft shortens them."""
        heads = tuple(config.modules_to_save or ())
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        looked_at: dict[str, int] = {}
        found = set()
        for path, module in _candidates(model):
            # peft trains what ends in a head's name: ``pre_classifier`` is one too
            if module is output or any(part.endswith(heads) for part in path.split(".")):
                continue
            kind = "LayerNorm" if isinstance(module, nn.LayerNorm) else "linear"
            looked_at[kind] = looked_at.get(kind, 0) + 1
            if module.bias is not None:
                found.add(path)
        if not found:
            seen = ", ".join(f"{count} {kind}" for kind, count in sorted(looked_at.items()))
            raise AdapterError(
                "FG-ADAPT-023",
                f"BitFit trains biases, and this {type(model).__name__} has none (looked at: "
                f"{seen or 'no linear or LayerNorm module'}; RMSNorm never has one)",
                allowed="models with biases: BERT, RoBERTa, DistilBERT, GPT-2, OPT, Qwen2",
                fix="method='ia3' trains about as little on any model; method='lora' is the usual",
            )
        return found

    def layer_for(self, module: nn.Module, key: str) -> _plugin.Layer:
        """A layer around ``module``, which must have a bias."""
        if getattr(module, "bias", None) is None:
            raise AdapterError(
                "FG-ADAPT-024",
                f"target_modules names {key}, a {type(module).__name__} without a bias",
                allowed="modules with a bias",
                fix="leave target_modules out: every bias of the model is found",
            )
        return BitFitLayer(module)


def _candidates(model: nn.Module) -> list[tuple[str, Any]]:
    """Linear and layer-norm modules by path; a wrapped one by the path of its wrapper."""
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
        conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if conv1d or isinstance(module, nn.Linear | nn.LayerNorm):
            found.append((path, module))
    return found


def attach(
    model: nn.Module,
    *,
    task_type: str = CAUSAL,
    adapter_name: str = "default",
    **settings: Any,
) -> Any:
    """Return ``model`` with a new, trainable difference to its biases.

    Args:
        settings: Fields of ``BitFitConfig``.

    Raises:
        AdapterError: FG-ADAPT-001 unknown target, FG-ADAPT-021 unknown setting, FG-ADAPT-023 no
            biases, FG-ADAPT-024 a target without one.
    """
    return _plugin.attach(BitFitConfig, "bitfit", model, task_type, adapter_name, settings)


METHOD = Method(
    summary="only biases train: the fewest parameters, for models that have biases",
    attach=attach,
    peft_type=_plugin.OwnPeftType.BITFIT.value,
    in_peft=False,
    learning_rates={"causal": 1e-2, "classification": 5e-3},
)
