"""Every kernel against its plain-torch twin in float64: the output and every gradient.

Our error in float32 and bfloat16 is at most twice the error that the reference itself makes in the
same precision, plus one rounding step.
"""

from __future__ import annotations

import pytest
import torch

from finegraft.core.registry import Registry
from finegraft.kernels._contract import Case, Op

KERNELS: Registry[Op] = Registry("finegraft.kernels", "OP", "kernel")
CASES = [
    pytest.param(op, name, case, id=f"{op_name}-{name}-{case.label}")
    for op_name, op in KERNELS.items()
    for name in op.implementations
    for case in op.cases()
]


def run(function, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {}
    for name, value in case.inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.to(dtype).clone().requires_grad_(name in case.grads)
        elif isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
            value = tuple(part.to(dtype) for part in value)
        inputs[name] = value
    outs = function(**inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    seed = torch.Generator().manual_seed(3)
    # Rounded to bfloat16 first: the same direction in every precision.
    directions = [
        torch.randn(o.shape, dtype=torch.float64, generator=seed).bfloat16().to(o.dtype)
        for o in outs
    ]
    torch.autograd.backward(outs, directions)
    found = {name: inputs[name].grad for name in case.grads}
    assert all(grad is not None for grad in found.values())
    return {**{f"output {i}": o.detach() for i, o in enumerate(outs)}, **found}


def as_seen(value, dtype):
    """The value as that precision sees it, in float64."""
    if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
        return tuple(as_seen(part, dtype) for part in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype).double()
    return value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "implementation", "case"), CASES)
def test_output_and_every_gradient(op, implementation, case, dtype):
    # The truth is computed from the inputs as that precision sees them, so that only the
    # arithmetic is judged and not the rounding of the inputs.
    rounded = Case(case.label, {k: as_seen(v, dtype) for k, v in case.inputs.items()}, case.grads)
    truth = run(op.reference, rounded, torch.float64)
    stock = run(op.stock or op.reference, rounded, dtype)
    ours = run(op.implementations[implementation], rounded, dtype)
    for name, exact in truth.items():
        # In float64 the reference is the truth itself, so sums in another order need some room.
        steps = 64 if dtype == torch.float64 else 1
        eps = steps * torch.finfo(dtype).eps
        theirs, mine = stock[name].double() - exact, ours[name].double() - exact
        # The norm is the measure; one element may stray further, which the maximum bounds.
        assert mine.norm() <= 2 * theirs.norm() + eps * exact.norm(), name
        assert mine.abs().max() <= 3 * theirs.abs().max() + eps * exact.abs().max(), name


def test_linear_cross_entropy_computes_no_gradient_in_evaluation():
    op = KERNELS.get("linear_cross_entropy")
    case = next(iter(op.cases()))
    with torch.no_grad():
        loss = op.implementations["chunked"](**case.inputs)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, op.reference(**case.inputs))
