"""Cross-entropy of a linear head in plain torch: the specification.

Shapes: n labelled rows, d hidden, v vocabulary, k trained rows of the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: float | torch.Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_ids: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``sum(-log softmax(cap(scale * hidden @ weight.T))[labels]) / num_items``.

    Args:
        hidden: [n, d], the rows that carry a label and no others.
        weight: [v, d].
        labels: [n], ids below v.
        num_items: Labelled tokens of the whole optimizer step, over all its micro-batches.
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv:2408.00118).
        logit_scale: Factor on the logits before the cap.
        row_ids: [k], rows of ``weight`` that ``rows`` stand for.
        rows: [k, d] in the dtype of ``weight``.

    Returns:
        Scalar in float32, or float64 for float64 inputs.
    """
    if row_ids is not None and rows is not None:
        weight = weight.index_copy(0, row_ids, rows)
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items
