"""RMS norm with a backward by hand: no float32 copy of the activations is kept.

What: y = w * x / rms(x) (arXiv:1910.07467). How: only x, w and the [t, 1] factor are saved; on
bfloat16 rows a compiled loop does forward and backward in one pass each, elsewhere torch does.
Constraint: the weight's gradient is computed whenever it is asked for. Trade-off: x is normalised
again in backward, which is cheaper than keeping it.

Shapes: ... leading, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from finegraft.kernels import _gpu, _loops
from finegraft.kernels._contract import Case, Op
from finegraft.kernels.rms_norm import compiled, composed

__all__ = ["OP", "reference", "rms_norm"]


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return ``(weight + offset) * x / sqrt(mean(x**2) + eps)`` in the dtype of ``x``.

    Args:
        x: [..., d].
        weight: [d].
        eps: Added to the mean square.
        offset: 1.0 for families that store the weight around zero (Gemma).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in ``x`` and ``weight``."""
    on_gpu = _gpu.kernel("rms_norm", x, weight)
    if on_gpu is not None:
        return on_gpu(x, weight, eps, offset)
    if _loops.refusal(x, weight) is None and not weight.requires_grad:
        return compiled.rms_norm(x, weight, eps, offset)
    return composed.rms_norm(x, weight, eps, offset)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(5)
    for shape, offset, trained in (
        ((3, 7), 0.0, True),
        ((2, 5, 33), 0.0, True),
        ((1, 129), 1.0, True),
        ((11, 576), 0.0, True),
        ((1, 3), 0.0, False),
        ((2, 5, 33), 1.0, False),
        ((37, 576), 0.0, False),
    ):
        inputs = {
            "x": torch.randn(*shape, dtype=torch.float64, generator=generator) * 3,
            "weight": torch.rand(shape[-1], dtype=torch.float64, generator=generator) + 0.5,
            "eps": 1e-5,
            "offset": offset,
        }
        label = "x".join(map(str, shape)) + f"-offset{offset}-trained{trained}"
        yield Case(label, inputs, ("x", "weight") if trained else ("x",))


OP = Op(
    reference=reference,
    implementations={"composed": composed.rms_norm, "fastest": rms_norm},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
