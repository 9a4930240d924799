"""Dropout from 16 random bits an element instead of one Bernoulli draw.

What: ``draw`` makes the bits, ``dropout`` applies them; kernels that drop inside a larger function
take the same bits. How: an element is kept where its bits, as int16, reach a threshold.
Constraint: the probability is rounded to 1 / 65,536 and kept elements are scaled by the rounded
one, so the expectation is exact. Trade-off: another random stream than torch's.

800 x 384 numbers in bfloat16 on one thread: torch's dropout takes 1.7 ms, eight times the product
with a 384 x 384 weight that it follows; drawing the bits takes 0.04 ms and applying them 0.06 ms.

Shapes: any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finegraft.kernels import _loops
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "draw", "dropout", "keep", "level"]

_LEVELS = 1 << 16
_FILL = _loops.Kernel("dropout", "fill")
_APPLY = _loops.Kernel("dropout", "apply")


def level(p: float) -> tuple[int, float]:
    """Return the least int16 that keeps an element, and the factor on kept elements.

    Args:
        p: Probability of dropping, 0 <= p < 1.
    """
    steps = min(round(p * _LEVELS), _LEVELS - 1)
    return steps - _LEVELS // 2, _LEVELS / (_LEVELS - steps)


def draw(shape: Sequence[int]) -> torch.Tensor:
    """Return random int16 of ``shape``, seeded by torch's default generator of the CPU."""
    size = 1
    for extent in shape:
        size *= extent
    words = torch.empty(-(-size // 4), dtype=torch.int64)
    if _loops.missing() is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
        _FILL(size, words, seed, words.numel())
    else:
        words.random_(-(2**63), None)
    return words.view(torch.int16)[:size].view(*shape)


def keep(noise: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """1 where an element is kept and 0 elsewhere, as ``dtype``."""
    out = torch.empty(noise.shape, dtype=dtype, device=noise.device)
    return torch.ge(noise, level(p)[0], out=out)  # 0.034 ms for 800 x 384; via bool 0.2 ms


def reference(x: torch.Tensor, noise: torch.Tensor, p: float) -> torch.Tensor:
    """Return ``x`` with elements dropped and the others scaled.

    Args:
        x: Any shape.
        noise: int16 of the same shape, as ``draw`` gives.
        p: Probability of dropping, 0 <= p < 1.

    Source: Dropout, jmlr.org/papers/v15/srivastava14a.html, in its inverted form.
    """
    least, scale = level(p)
    return x.masked_fill(noise < least, 0.0) * scale


def dropout(x: torch.Tensor, noise: torch.Tensor, p: float) -> torch.Tensor:
    """Same contract as ``reference``; differentiable in ``x``."""
    out: torch.Tensor = _Dropout.apply(x, noise, p)
    return out


def apply(x: torch.Tensor, noise: torch.Tensor, p: float) -> torch.Tensor:
    """Drop and scale outside autograd; the gradient is the same function of the gradient."""
    least, scale = level(p)
    if _loops.refusal(x) is None and x.is_contiguous():
        out = torch.empty_like(x)
        _APPLY(x.numel(), x, noise, out, x.numel(), least, scale)
        return out
    return (x * keep(noise, p, x.dtype)).mul_(scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, noise: torch.Tensor, p: float) -> torch.Tensor:
        ctx.save_for_backward(noise)
        ctx.p = p
        return apply(x, noise, p)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (noise,) = ctx.saved_tensors
        return apply(grads[0], noise, ctx.p), None, None


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(8)
    for shape, p in (((1,), 0.5), ((3, 7), 0.1), ((2, 5, 33), 0.01), ((31, 300), 0.9)):
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator).short()
        inputs = {
            "x": torch.randn(*shape, dtype=torch.float64, generator=generator),
            "noise": bits,
            "p": p,
        }
        yield Case("x".join(map(str, shape)) + f"-p{p}", inputs, ("x",))


OP = Op(
    reference=reference,
    implementations={"bits": dropout},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)
