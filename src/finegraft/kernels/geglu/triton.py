"""GELU-gated activation in Triton: the kernels of ``kernels/swiglu`` with another inner function.

Constraint: GELU in its tanh form, which Gemma uses; the erf form is another function. Trade-off: an
import of a neighbour instead of the same two kernels twice.

Source: https://arxiv.org/abs/2002.05202. Shapes: ... leading, f features of one half.
"""

from __future__ import annotations

import torch

from finegraft.kernels.swiglu.triton import gated

__all__ = ["geglu"]


def geglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``gelu_tanh(gate) * up``.

    Args:
        gate: [..., f], float32, bfloat16 or float16, leading dimensions of any strides. Without
            ``up``: [..., 2f], the output of a stacked product with the gate first.
        up: [..., f], of strides of its own.

    Returns:
        [..., f], contiguous, differentiable once.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002, an
            odd width, or a gate and an up that do not belong together.

    Source:
        https://arxiv.org/abs/2002.05202; GELU, https://arxiv.org/abs/1606.08415
    """
    return gated("geglu", gate, up, gelu=True)
