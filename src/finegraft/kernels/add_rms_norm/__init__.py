"""Residual add and RMS norm in one: a decoder block's sum, and what its next part reads.

What: total = x + delta, y = rms_norm(total). How: one compiled pass on bfloat16 rows; the backward
adds the residual's gradient in the same pass. Trade-off: the norm's saved input is the sum itself,
which the residual stream keeps anyway.

Shapes: ... leading, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from finegraft.kernels import _gpu, _loops
from finegraft.kernels import rms_norm as norm
from finegraft.kernels._contract import Case, Op
from finegraft.kernels.rms_norm import compiled, composed

__all__ = ["OP", "add_rms_norm", "reference"]


def reference(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + delta`` and its RMS norm.

    Args:
        x: [..., d], the residual stream.
        delta: [..., d], what is added to it.
        weight: [d].
        eps: Added to the mean square.
        offset: Added to the weight.
    """
    total = x + delta
    return total, norm.reference(total, weight, eps, offset)


def _composed(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + delta
    return total, composed.rms_norm(total, weight, eps, offset)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as ``reference``; differentiable in ``x``, ``delta`` and ``weight``."""
    on_gpu = _gpu.kernel("add_rms_norm", x, delta, weight)
    if on_gpu is not None:
        return on_gpu(x, delta, weight, eps, offset)
    if _loops.refusal(x, delta, weight) is None and not weight.requires_grad:
        return compiled.add_rms_norm(x, delta, weight, eps, offset)
    return _composed(x, delta, weight, eps, offset)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(15)
    for shape, offset, trained in (
        ((3, 7), 0.0, True),
        ((2, 5, 33), 1.0, False),
        ((1, 129), 0.0, False),
        ((37, 576), 0.0, False),
    ):
        inputs = {
            "x": torch.randn(*shape, dtype=torch.float64, generator=generator) * 3,
            "delta": torch.randn(*shape, dtype=torch.float64, generator=generator),
            "weight": torch.rand(shape[-1], dtype=torch.float64, generator=generator) + 0.5,
            "eps": 1e-5,
            "offset": offset,
        }
        label = "x".join(map(str, shape)) + f"-offset{offset}-trained{trained}"
        yield Case(label, inputs, ("x", "delta", "weight") if trained else ("x", "delta"))


OP = Op(
    reference=reference,
    implementations={"composed": _composed, "fastest": add_rms_norm},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
