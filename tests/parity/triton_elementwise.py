"""The elementwise Triton kernels against plain torch in float64: outputs and every gradient.

The references here are the compositions that transformers runs, written again from the formulas.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _compare import DEVICE, DTYPES, check, require_triton, round_to_nearest, strided, transposed

from finegraft.core.errors import ConfigError
from finegraft.core.registry import Registry
from finegraft.kernels._contract import Op

require_triton()

from finegraft.kernels.add_rms_norm.triton import add_rms_norm  # noqa: E402
from finegraft.kernels.geglu.triton import geglu  # noqa: E402
from finegraft.kernels.linear_cross_entropy.triton import linear_cross_entropy  # noqa: E402
from finegraft.kernels.rms_norm.triton import rms_norm  # noqa: E402
from finegraft.kernels.rotary.triton import rotary  # noqa: E402
from finegraft.kernels.swiglu.triton import swiglu  # noqa: E402

__all__ = ["round_to_nearest"]

LAYOUTS = pytest.mark.parametrize("layout", [None, strided, transposed])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


OURS = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": swiglu,
    "geglu": geglu,
    "rotary": rotary,
    "linear_cross_entropy": linear_cross_entropy,
}
KERNELS: Registry[Op] = Registry("finegraft.kernels", "OP", "kernel")
CASES = [
    pytest.param(name, case, id=f"{name}-{case.label}")
    for name in OURS
    for case in KERNELS.get(name).cases()
    if not case.label.startswith("n300-")  # 12 million logits: minutes in the interpreter
]


@EVERY_DTYPE
@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_contract_of_every_operation(name, case, dtype):
    check(OURS[name], KERNELS.get(name).reference, case.inputs, case.grads, dtype)


def randn(*shape: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def stock_norm(x, weight, eps, offset=0.0):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def stock_add_norm(x, delta, weight, eps, offset=0.0):
    total = x + delta
    return total, stock_norm(total, weight, eps, offset)


def stock_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def stock_geglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def stock_rotary(x, cos, sin):
    r = cos.shape[-1]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


NORMS = [((1, 1), 0.0), ((3, 7), 0.0), ((2, 5, 33), 0.0), ((1, 129), 1.0), ((11, 576), 0.0)]
NORMS += [((2, 3000), 1.0), ((300, 60), 0.0), ((17, 2048), 0.0)]


@EVERY_DTYPE
@LAYOUTS
@pytest.mark.parametrize(("shape", "offset"), NORMS)
def test_rms_norm(shape, offset, layout, dtype):
    inputs = {"x": randn(*shape) * 3, "weight": randn(shape[-1]).abs() + 0.5}
    check(
        rms_norm, stock_norm, {**inputs, "eps": 1e-5, "offset": offset}, ("x", "weight"), dtype,
        layout if layout is None else only_matrices(layout),
    )  # fmt: skip


def only_matrices(layout):
    return lambda x: layout(x) if x.dim() > 1 else x


@pytest.mark.parametrize("grads", [("x",), ("weight",), ()])
def test_rms_norm_gives_the_gradients_that_are_asked_for(grads):
    inputs = {"x": randn(9, 40), "weight": randn(40), "eps": 1e-5}
    check(rms_norm, stock_norm, inputs, grads, torch.float32)


def test_rms_norm_sums_the_weight_gradient_in_float32():
    # 4,096 ones: bfloat16 sums would stop at 256.
    x = torch.ones(4096, 8, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.ones(8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, 0.0).backward(torch.ones_like(x))
    assert weight.grad.tolist() == [4096.0] * 8


def test_weight_in_float32_beside_bfloat16_rows():
    x, weight = randn(5, 33).bfloat16().to(DEVICE), randn(33).float().to(DEVICE)
    weight.requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    want = stock_norm(x.double(), weight.double(), 1e-5)
    assert (out.double() - want).norm() <= 2**-8 * want.norm()


@EVERY_DTYPE
@LAYOUTS
@pytest.mark.parametrize(("shape", "offset"), NORMS[:6])
def test_add_rms_norm(shape, offset, layout, dtype):
    inputs = {"x": randn(*shape) * 3, "delta": randn(*shape, seed=6)}
    inputs |= {"weight": randn(shape[-1]).abs() + 0.5, "eps": 1e-5, "offset": offset}
    layout = layout if layout is None else only_matrices(layout)
    check(add_rms_norm, stock_add_norm, inputs, ("x", "delta", "weight"), dtype, layout)


@pytest.mark.parametrize("grads", [("x",), ("delta",), ("weight",), ("x", "delta")])
def test_add_rms_norm_gives_the_gradients_that_are_asked_for(grads):
    inputs = {"x": randn(9, 40), "delta": randn(9, 40, seed=6), "weight": randn(40), "eps": 1e-5}
    check(add_rms_norm, stock_add_norm, inputs, grads, torch.float32)


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_with_one_output_unused(used):
    inputs = {"x": randn(9, 40), "delta": randn(9, 40, seed=6), "weight": randn(40), "eps": 1e-5}
    grads = ("x", "delta", "weight") if used else ("x", "delta")
    check(
        lambda **kw: add_rms_norm(**kw)[used], lambda **kw: stock_add_norm(**kw)[used],
        inputs, grads, torch.float32,
    )  # fmt: skip


def test_add_rms_norm_normalises_the_rounded_sum():
    x, delta = (randn(7, 65, seed=s).bfloat16().to(DEVICE) for s in (1, 2))
    weight = torch.ones(65, dtype=torch.bfloat16, device=DEVICE)
    total, out = add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    assert torch.equal(out, rms_norm(total, weight, 1e-6))


GATED = [(1, 2), (3, 14), (2, 5, 66), (17, 2 * 1536), (4, 2 * 2100)]


@EVERY_DTYPE
@LAYOUTS
@pytest.mark.parametrize("shape", GATED)
@pytest.mark.parametrize(("ours", "stock"), [(swiglu, stock_swiglu), (geglu, stock_geglu)])
def test_gated(ours, stock, shape, layout, dtype):
    check(
        lambda gate_up: ours(gate_up),
        stock,
        {"gate_up": randn(*shape) * 2},
        ("gate_up",),
        dtype,
        layout,
    )


@EVERY_DTYPE
@LAYOUTS
@pytest.mark.parametrize("act", [swiglu, geglu])
def test_gated_from_two_tensors(act, layout, dtype):
    def stock(gate, up):
        return (stock_swiglu if act is swiglu else stock_geglu)(torch.cat([gate, up], -1))

    inputs = {"gate": randn(2, 5, 1033) * 2, "up": randn(2, 5, 1033, seed=6)}
    check(lambda gate, up: act(gate, up), stock, inputs, ("gate", "up"), dtype, layout)


def test_gate_and_up_with_strides_of_their_own():
    gate, up = (randn(4, 33, seed=s).float().to(DEVICE) for s in (1, 2))
    want = stock_swiglu(torch.cat([gate, up], -1))
    torch.testing.assert_close(swiglu(strided(gate), up), want)
    torch.testing.assert_close(swiglu(gate, strided(up)), want)


@EVERY_DTYPE
@pytest.mark.parametrize(("ours", "stock"), [(swiglu, stock_swiglu), (geglu, stock_geglu)])
def test_gated_far_from_zero(ours, stock, dtype):
    gate = torch.linspace(-60, 60, 241, dtype=torch.float64)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    check(lambda gate_up: ours(gate_up), stock, {"gate_up": gate_up}, ("gate_up",), dtype)


@EVERY_DTYPE
@LAYOUTS
@pytest.mark.parametrize(
    ("t", "h", "f", "r"),
    [(1, 1, 2, 1), (7, 3, 8, 4), (13, 2, 10, 3), (31, 9, 64, 32), (3, 40, 160, 80)],
)
def test_rotary(t, h, f, r, layout, dtype):
    angle = randn(t, r) * 6
    inputs = {"x": randn(t, h, f), "cos": angle.cos(), "sin": angle.sin()}
    check(rotary, stock_rotary, inputs, ("x",), dtype, layout)


def test_rotary_of_a_slice_of_stacked_products():
    stacked = randn(9, (4 + 2 + 2) * 16).float().to(DEVICE)
    angle = randn(9, 8).float().to(DEVICE)
    q, k, _ = stacked.split([64, 32, 32], -1)
    for part in (q, k):
        x = part.view(9, -1, 16)
        want = stock_rotary(x, angle.cos(), angle.sin())
        torch.testing.assert_close(rotary(x, angle.cos(), angle.sin()), want)


def test_rotary_with_tables_in_float32_keeps_the_dtype_of_x():
    x, angle = randn(5, 3, 16).bfloat16().to(DEVICE), randn(5, 8).float().to(DEVICE)
    out = rotary(x, angle.cos(), angle.sin())
    assert out.dtype == torch.bfloat16
    want = stock_rotary(x.double(), angle.cos().double(), angle.sin().double())
    assert (out.double() - want).norm() <= 2**-8 * want.norm()


@EVERY_DTYPE
def test_no_rows(dtype):
    none = {"weight": randn(8).abs(), "eps": 1e-5}
    check(rms_norm, stock_norm, {"x": randn(0, 8), **none}, ("x", "weight"), dtype)
    both = {"x": randn(0, 8), "delta": randn(0, 8), **none}
    check(add_rms_norm, stock_add_norm, both, ("x", "delta", "weight"), dtype)
    for activation, stock in ((swiglu, stock_swiglu), (geglu, stock_geglu)):
        inputs = {"gate_up": randn(2, 0, 8)}
        check(lambda gate_up, act=activation: act(gate_up), stock, inputs, ("gate_up",), dtype)
    tables = {"cos": randn(0, 4), "sin": randn(0, 4)}
    check(rotary, stock_rotary, {"x": randn(0, 3, 8), **tables}, ("x",), dtype)


def test_every_run_gives_the_same_bits():
    found = []
    for _ in range(2):
        x, weight = randn(300, 60).bfloat16().to(DEVICE), randn(60).bfloat16().to(DEVICE)
        weight.requires_grad_()
        rms_norm(x, weight, 1e-5).backward(x)
        found.append(weight.grad)
    assert torch.equal(*found)


def test_inputs_are_not_written_to():
    x, weight, angle = (randn(*s).float().to(DEVICE) for s in ((6, 3, 8), (8,), (6, 4)))
    x.requires_grad_()
    copies = [v.detach().clone() for v in (x, weight, angle)]
    for out in (
        rms_norm(x, weight, 1e-5), *add_rms_norm(x, x, weight, 1e-5), swiglu(x), geglu(x),
        rotary(x, angle, angle),
    ):  # fmt: skip
        out.backward(out.detach(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, angle), copies, strict=True))


CALLS = {
    "rms_norm": lambda x: rms_norm(x, x[0, 0], 1e-5),
    "add_rms_norm": lambda x: add_rms_norm(x, x, x[0, 0], 1e-5),
    "swiglu": swiglu,
    "geglu": geglu,
    "rotary": lambda x: rotary(x, x.detach()[:, 0, :4], x.detach()[:, 0, :4]),
}


@pytest.mark.parametrize("name", CALLS)
def test_float64_is_refused(name):
    with pytest.raises(ConfigError, match=r"FG-KERNEL-001.*float64"):
        CALLS[name](randn(2, 3, 8).to(DEVICE))


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    x = randn(2, 3, 8).float().to(DEVICE).requires_grad_()
    out = CALLS[name](x)
    out = out[0] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_wrong_shapes_are_refused():
    x, weight = randn(2, 3, 8).float().to(DEVICE), randn(7).float().to(DEVICE)
    wrong = (
        lambda: rms_norm(x, weight, 1e-5),
        lambda: rms_norm(x.new_zeros(1, 32_769), x.new_zeros(32_769), 1e-5),
        lambda: add_rms_norm(x, x[:1], x[0, 0], 1e-5),
        lambda: add_rms_norm(x, x.bfloat16(), x[0, 0], 1e-5),
        lambda: swiglu(x[..., :7]),
        lambda: geglu(x[..., :7]),
        lambda: swiglu(x, x[..., :4]),
        lambda: geglu(x, x.bfloat16()),
        lambda: rotary(x, x[:, 0, :5], x[:, 0, :5]),
        lambda: rotary(x, x[:1, 0, :4], x[:1, 0, :4]),
        lambda: rotary(x, x[:, 0, :4].clone().requires_grad_(), x[:, 0, :4]),
    )
    for call in wrong:
        with pytest.raises(ConfigError, match="FG-KERNEL-002"):
            call()
