"""A linear layer with a low-rank update in plain torch: the specification.

Shapes: ... leading, i in, o out, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T``.

    Args:
        x: [..., i].
        weight: [o, i], frozen: it receives no gradient.
        bias: [o] or None, frozen.
        lora_a: [r, i].
        lora_b: [o, r].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Returns:
        [..., o] in the dtype of ``x``.

    Source: LoRA, arXiv:2106.09685, equation 3.
    """
    update = F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype)) * scaling
    return F.linear(x, weight.detach(), None if bias is None else bias.detach()) + update
