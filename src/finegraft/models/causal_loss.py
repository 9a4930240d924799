"""Give a causal language model our loss: labelled rows only, never the full logits.

What: a subclass of the model's own class whose ``forward(labels=...)`` ends in the compact linear
cross-entropy. How: made once per stock class and set on the instance by ``swap``. Constraint: a
model whose logits are more than head(hidden) is noticed by a probe of four tokens and refused.
Trade-off: in training the output has no logits; ask without labels, or in eval mode, to get them.

Shapes: b rows, t tokens, d hidden, v vocabulary, n labelled positions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from finegraft.kernels.linear_cross_entropy import linear_cross_entropy
from finegraft.models import swap

_WANTS_MORE = ("output_hidden_states", "output_attentions", "past_key_values")


class CompactLoss(swap.SavesAsStock):
    """Mixed into a stock causal model; ``stock_class`` is set on the class made from it."""

    stock_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stock forward, except that with labels the loss is computed without the logits.

        In eval mode the stock logits are computed as well, unless ``loss_only=True``.
        """
        loss_only = kwargs.pop("loss_only", self.training)
        if args:
            names = list(inspect.signature(self.stock_class.forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        labels = kwargs.get("labels")
        if labels is None or not loss_only or any(kwargs.get(name) for name in _WANTS_MORE):
            return super().forward(**kwargs)
        kwargs.pop("labels")
        num_items = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        decoder = getattr(self, self.base_model_prefix)
        if not getattr(decoder, "takes_documents", False):
            hidden = decoder(**kwargs)[0]  # [b, t, d]
            return CausalLMOutputWithPast(loss=compact_loss(self, hidden, labels, num_items))
        where, targets = _labelled(labels)
        rows = decoder(**kwargs, rows=where)[0][0]  # [n, d]: nothing else is scored
        return CausalLMOutputWithPast(loss=_loss_of_rows(self, rows, targets, num_items))


def compact_loss(
    model: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    num_items: float | torch.Tensor | None,
) -> torch.Tensor:
    """Next-token cross-entropy of ``hidden`` at the labelled positions.

    Args:
        model: Has ``get_output_embeddings`` and a transformers config.
        hidden: [b, t, d].
        labels: [b, t], -100 where nothing is learnt; shifted here.
        num_items: Labelled tokens of the whole step; None: those of this batch.

    Returns:
        Scalar; exactly zero, with a gradient of zero, when no position carries a label.
    """
    where, targets = _labelled(labels)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)  # [n, d]
    return _loss_of_rows(model, rows, targets, num_items)


def _labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [n] in b * t that predict a labelled token, and these tokens."""
    targets = labels[:, 1:].reshape(-1)
    where = (targets != -100).nonzero().squeeze(-1)
    targets = targets.index_select(0, where)
    return where + where // (labels.shape[1] - 1 or 1), targets


def _loss_of_rows(
    model: nn.Module,
    rows: torch.Tensor,
    targets: torch.Tensor,
    num_items: float | torch.Tensor | None,
) -> torch.Tensor:
    if targets.numel() == 0:
        return rows.sum() * 0.0
    if num_items is None:
        num_items = float(targets.numel())
    softcap, scale = _logit_transform(model.config.get_text_config())
    head = _active(model.get_output_embeddings())
    if type(head) is nn.Linear and head.bias is None:
        weight = head.weight
        if weight.requires_grad:  # a float32 master copy beside half precision, see training.heads
            weight = weight.to(rows.dtype)
        if weight.dtype == rows.dtype:
            return linear_cross_entropy(rows, weight, targets, num_items, softcap, scale)
    trained = _trained_rows(head, rows.dtype)
    if trained is not None:
        weight, ids, values = trained
        return linear_cross_entropy(rows, weight, targets, num_items, softcap, scale, ids, values)
    logits = head(rows).float() * scale  # an adapted, trained or quantized head
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum") / num_items


def _active(head: Any) -> Any:
    """The copy that an adapter trains whole (``modules_to_save``), else the head as it is."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None or head.disable_adapters:
        return head
    names = [name for name in head.active_adapters if name in copies]
    return copies[names[0]] if len(names) == 1 else head


def _trained_rows(head: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...] | None:
    """Weight [v, d], ids [k] and rows [k, d] of a head that trains some rows; None for others."""
    adapter = getattr(head, "token_adapter", None)
    found = adapter.trained_rows() if hasattr(adapter, "trained_rows") else None
    if found is None or adapter.base_layer.weight.dtype != dtype:
        return None
    return (adapter.base_layer.weight, *found)


def _logit_transform(config: Any) -> tuple[float | None, float]:
    """Soft-cap and factor that families put on their logits (Gemma 2; Cohere, Granite)."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return getattr(config, "final_logit_softcapping", None), scale / divisor


def apply(model: nn.Module) -> bool:
    """Swap the causal model inside ``model`` (itself, or what peft wraps); True when it is fast."""
    core = swap.core(model)
    if isinstance(core, CompactLoss):
        return True
    reason = _reason_against(core)
    if reason is not None:
        swap.refuse(core, reason)
        return False
    return swap.swap(core, swap.fast_class(CompactLoss, type(core), shows_stock=True))


def _reason_against(model: nn.Module) -> str | None:
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix) or not hasattr(model, "get_output_embeddings"):
        return "not a causal language model with one decoder and one head"
    if model.get_output_embeddings() is None:
        return "it has no output head"
    if hasattr(model, "router_aux_loss_coef"):
        return "its loss has a router term besides cross-entropy"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "its weights are not in memory"
    return _probe(model)


@torch.no_grad()
def _probe(model: nn.Module) -> str | None:
    """Compare our loss with the stock one on four tokens; a reason when they differ."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        device = model.get_input_embeddings().weight.device
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.tensor([[5, 11, 3, 7]], device=device) % vocabulary
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)[0]
        ours = compact_loss(model, hidden, ids, None)
    finally:
        for module, flag in training.items():
            module.training = flag
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
    if not torch.allclose(ours.float(), expected.float(), rtol=tolerance, atol=tolerance):
        return f"its logits are not head(hidden): loss {ours:.4f} instead of {expected:.4f}"
    return None
