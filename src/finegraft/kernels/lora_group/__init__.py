"""Linear layers of one input and their low-rank updates, as one function.

What: q, k and v, or gate and up, or a single layer: y_j = x W_j' + b_j + s_j (x A_j') B_j'.
Frozen weights that lie behind one another in memory (``stack``) are one product; all A_j are one,
all B_j are one.

Shapes: ... leading, i in, o_j out, r_j rank (0: a layer without adapter).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from finegraft.kernels._contract import Case, Op
from finegraft.kernels.lora_group import fused
from finegraft.kernels.lora_group.fused import Part, lora_group, stack

__all__ = ["OP", "Part", "lora_group", "reference", "stack"]


def reference(x: torch.Tensor, parts: Sequence[Part]) -> tuple[torch.Tensor, ...]:
    """Return each part's ``x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T``.

    Args:
        x: [..., i].
        parts: The layers; weights and biases are frozen and receive no gradient.

    Returns:
        One [..., o_j] per part in the dtype of ``x``.

    Source: LoRA, arXiv:2106.09685, equation 3.
    """
    outs = []
    for part in parts:
        bias = None if part.bias is None else part.bias.detach()
        out = F.linear(x, part.weight.detach(), bias)
        if part.lora_a is not None and part.lora_b is not None:
            low = F.linear(x, part.lora_a.to(x.dtype))
            out = out + F.linear(low, part.lora_b.to(x.dtype)) * part.scaling
        outs.append(out)
    return tuple(outs)


def _flat(function):
    """The operation over plain tensors, as the parity tests give them."""

    def run(x, stacked, scaling, **tensors):
        count = sum(name.startswith("weight") for name in tensors)
        weights = [tensors[f"weight{j}"] for j in range(count)]
        if stacked:
            weights = stack(weights)
        parts = [
            Part(
                weights[j],
                tensors.get(f"bias{j}"),
                tensors.get(f"lora_a{j}"),
                tensors.get(f"lora_b{j}"),
                scaling * (j + 1),
            )
            for j in range(count)
        ]
        return function(x, parts)

    return run


def _unsupported(x: torch.Tensor, **_: object) -> str | None:
    return None if x.is_floating_point() else f"x is {x.dtype}"


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for lead, i, layers, stacked in (
        ((1,), 3, ((5, 1, False),), False),
        ((2, 7), 33, ((17, 4, True),), False),
        ((3, 1, 5), 64, ((129, 16, False), (33, 8, False), (33, 0, False)), True),
        ((31,), 48, ((24, 64, True), (40, 2, True)), True),
        ((31,), 48, ((24, 3, True), (40, 2, False)), False),
        ((9,), 16, ((8, 0, False), (8, 0, True)), True),
    ):
        inputs: dict = {"x": normal(*lead, i), "stacked": stacked, "scaling": 0.75}
        grads = ["x"]
        for j, (o, r, with_bias) in enumerate(layers):
            inputs[f"weight{j}"] = normal(o, i) / i**0.5
            if with_bias:
                inputs[f"bias{j}"] = normal(o)
            if r:
                inputs[f"lora_a{j}"] = normal(r, i) / i**0.5
                inputs[f"lora_b{j}"] = normal(o, r) / r**0.5
                grads += [f"lora_a{j}", f"lora_b{j}"]
        sizes = "-".join(f"o{o}r{r}b{int(b)}" for o, r, b in layers)
        label = "x".join(map(str, lead)) + f"-i{i}-{sizes}-stacked{int(stacked)}"
        yield Case(label, inputs, tuple(grads))


OP = Op(
    reference=_flat(reference),
    implementations={"fused": _flat(fused.lora_group)},
    unsupported=_unsupported,
    mutates=(),
    cases=_cases,
)
