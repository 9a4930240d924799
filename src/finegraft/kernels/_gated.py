"""What the gated activations share: act(gate) * up and its backward.

How: gate and up may be columns of one wider tensor; their gradients always are, gate's first. On
bfloat16 rows the operation's own compiled loops run, elsewhere torch's activation and its backward.

Shapes: t rows (all leading dimensions), f features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from finegraft.kernels import _loops
from finegraft.kernels._contract import Case


@dataclass(frozen=True)
class Activation:
    """One activation: ``forward(x)``, ``backward(dy, x)``, and where its compiled loops are."""

    operation: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    loops: tuple[_loops.Kernel, _loops.Kernel] = field(init=False)

    def __post_init__(self) -> None:
        kernels = (_loops.Kernel(self.operation, name) for name in ("forward", "backward"))
        object.__setattr__(self, "loops", tuple(kernels))


def gated(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, *, compiled: bool = True
) -> torch.Tensor:
    """Return ``activation(gate) * up`` [..., f].

    Args:
        compiled: Whether the compiled loops may run.
    """
    rows = [_rows(x) for x in (gate, up)]
    compiled = compiled and _loops.refusal(*rows) is None
    out: torch.Tensor = _Gated.apply(*rows, activation, compiled)
    return out.view(gate.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[t, f]; a view where the leading dimensions allow one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation, compiled: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.compiled = activation, compiled
        if not compiled:
            return activation.forward(gate).mul_(up)
        (t, f), out = gate.shape, torch.empty_like(gate, memory_format=torch.contiguous_format)
        activation.loops[0](t * f, gate, up, gate.stride(0), up.stride(0), out, t, f)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        activation, dout = ctx.activation, grads[0].contiguous()
        t, f = gate.shape
        both = gate.new_empty(t, 2 * f)
        d_gate, d_up = both.split(f, -1)
        if ctx.compiled:
            activation.loops[1](t * f, dout, gate, up, gate.stride(0), up.stride(0), both, t, f)
        else:
            d_gate.copy_(activation.backward(dout * up, gate))
            torch.mul(activation.forward(gate), dout, out=d_up)
        return d_gate, d_up, None, None


def cases(seed: int) -> Iterator[Case]:
    """Odd shapes for the parity tests of both activations."""
    generator = torch.Generator().manual_seed(seed)
    for shape in ((1,), (3, 7), (2, 5, 33), (17, 1536)):
        inputs = {
            name: torch.randn(*shape, dtype=torch.float64, generator=generator) * 2
            for name in ("gate", "up")
        }
        yield Case("x".join(map(str, shape)), inputs, ("gate", "up"))
