"""LoRA linear: a frozen product and its trainable low-rank update in one autograd function."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from finegraft.kernels._contract import Case, Op
from finegraft.kernels.lora_linear import fused, reference

__all__ = ["OP", "lora_linear"]

lora_linear = fused.lora_linear


def _unsupported(x: torch.Tensor, weight: torch.Tensor, **_: object) -> str | None:
    if x.dtype != weight.dtype:
        return f"x is {x.dtype}, the base weight is {weight.dtype}"
    return None


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for lead, i, o, r, with_bias in (
        ((1,), 3, 5, 1, False),
        ((2, 7), 33, 17, 4, True),
        ((3, 1, 5), 64, 129, 16, False),
        ((31,), 48, 24, 64, True),
    ):
        inputs = {
            "x": normal(*lead, i),
            "weight": normal(o, i) / i**0.5,
            "bias": normal(o) if with_bias else None,
            "lora_a": normal(r, i) / i**0.5,
            "lora_b": normal(o, r) / r**0.5,
            "scaling": 0.75,
        }
        label = "x".join(map(str, lead)) + f"-i{i}-o{o}-r{r}-bias{int(with_bias)}"
        yield Case(label, inputs, ("x", "lora_a", "lora_b"))


OP = Op(
    reference=reference.lora_linear,
    implementations={"fused": fused.lora_linear},
    unsupported=_unsupported,
    mutates=(),
    cases=_cases,
)
