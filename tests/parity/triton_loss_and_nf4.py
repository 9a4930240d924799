"""Linear cross-entropy and 4-bit dequantising in Triton against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from _compare import DEVICE, DTYPES, check, require_triton, round_to_nearest, strided, transposed
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from finegraft.core.errors import ConfigError
from finegraft.kernels.nf4 import OP, dense, reference, scales

require_triton()

import triton as triton_package  # noqa: E402
import triton.language as tl  # noqa: E402

from finegraft.kernels.linear_cross_entropy import triton as loss_module  # noqa: E402
from finegraft.kernels.linear_cross_entropy.triton import linear_cross_entropy, tanh  # noqa: E402
from finegraft.kernels.nf4.triton import Nested, dequantize, dequantize_nested  # noqa: E402

__all__ = ["round_to_nearest"]

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def stock_loss(hidden, weight, labels, num_items, softcap=None, logit_scale=1.0):
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


def loss_inputs(n, d, v, spread=1.0):
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden": torch.randn(n, d, dtype=torch.float64, generator=generator) * spread,
        "weight": torch.randn(v, d, dtype=torch.float64, generator=generator) / d**0.5,
        "labels": torch.randint(0, v, (n,), generator=generator),
        "num_items": float(n + 3),
    }


LOSSES = [  # n, d, v, softcap, logit_scale
    (1, 8, 5, None, 1.0),
    (1, 4, 1, None, 1.0),
    (7, 33, 131, None, 1.0),
    (13, 17, 97, 30.0, 1.0),
    (5, 64, 1031, None, 0.0625),
    (6, 16, 333, 2.0, -0.5),
    (9, 24, 9001, 30.0, 2.0),
]


@EVERY_DTYPE
@pytest.mark.parametrize(("n", "d", "v", "softcap", "scale"), LOSSES)
def test_linear_cross_entropy(n, d, v, softcap, scale, dtype):
    inputs = {**loss_inputs(n, d, v), "softcap": softcap, "logit_scale": scale}
    check(linear_cross_entropy, stock_loss, inputs, ("hidden", "weight"), dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", [strided, transposed])
def test_linear_cross_entropy_of_views(layout, dtype):
    inputs = loss_inputs(7, 33, 131)
    check(linear_cross_entropy, stock_loss, inputs, ("hidden", "weight"), dtype, layout)


@EVERY_DTYPE
def test_linear_cross_entropy_in_several_chunks(monkeypatch, dtype):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 128 * 53)
    check(linear_cross_entropy, stock_loss, loss_inputs(300, 9, 53), ("hidden", "weight"), dtype)


@EVERY_DTYPE
def test_linear_cross_entropy_of_logits_far_apart(dtype):
    inputs = loss_inputs(6, 16, 5000, spread=40.0)
    check(linear_cross_entropy, stock_loss, inputs, ("hidden", "weight"), dtype)


@pytest.mark.parametrize("grads", [("hidden",), ("weight",), ()])
def test_linear_cross_entropy_gives_the_gradients_that_are_asked_for(grads):
    check(linear_cross_entropy, stock_loss, loss_inputs(7, 12, 77), grads, torch.float32)


def test_linear_cross_entropy_of_no_rows():
    inputs = loss_inputs(0, 12, 77)
    check(linear_cross_entropy, stock_loss, inputs, ("hidden", "weight"), torch.float32)


def on_device(floats=torch.float32, /, **values):
    return {
        k: v.to(DEVICE, floats if v.is_floating_point() else None)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in values.items()
    }


def test_num_items_may_be_a_tensor():
    inputs = on_device(**loss_inputs(7, 12, 77))
    want = linear_cross_entropy(**inputs)
    got = linear_cross_entropy(**inputs | {"num_items": torch.tensor(10.0, device=DEVICE)})
    torch.testing.assert_close(got, want)


def test_evaluation_computes_the_loss_and_no_gradient(monkeypatch):
    products = []
    stock = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **kw: products.append(1) or stock(*a, **kw))
    with torch.no_grad():
        loss = linear_cross_entropy(**on_device(**loss_inputs(7, 12, 77)))
    assert loss.grad_fn is None and len(products) == 1


@pytest.mark.parametrize("label", [-100, 77])
def test_a_label_outside_the_vocabulary_is_not_silent(label):
    inputs = on_device(**loss_inputs(7, 12, 77))
    inputs["labels"][3] = label
    assert linear_cross_entropy(**inputs).isnan()


def test_masked_out_vocabulary():
    # Heads padded with rows that give -inf: they take no probability and spread no NaN.
    @triton_package.jit
    def fill(x):
        tl.store(x + tl.arange(0, 4), float("-inf"))

    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    fill[(1,)](logits)
    want = F.cross_entropy(logits, torch.tensor([7], device=DEVICE))
    loss = logits.new_empty(1)
    loss_module._losses(logits, torch.tensor([7], device=DEVICE), loss, None, 1.0, True)
    torch.testing.assert_close(loss[0], want)
    assert logits[0, :4].tolist() == [0.0] * 4 and not logits.isnan().any()


def test_autocast_does_not_change_the_dtype_of_the_products():
    inputs = on_device(**loss_inputs(7, 12, 77))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = linear_cross_entropy(**inputs)
    assert torch.equal(loss, linear_cross_entropy(**inputs))


@triton_package.jit
def tanh_kernel(x, y, n, COLUMNS: tl.constexpr):
    at = tl.arange(0, COLUMNS)
    tl.store(y + at, tanh(tl.load(x + at, mask=at < n, other=0.0)), mask=at < n)


def test_tanh_is_right_everywhere():
    x = torch.cat([torch.logspace(-30, 30, 1001), torch.linspace(0, 12, 2001)])
    x = torch.cat([x, -x, torch.zeros(1), torch.tensor([torch.inf, -torch.inf])]).to(DEVICE)
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, x.numel(), COLUMNS=8192)
    exact = x.double().tanh()
    assert ((y - exact).abs() <= 3e-7 * exact.abs()).all()


@pytest.mark.parametrize("case", OP.cases(), ids=lambda c: c.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantize_is_bit_equal_to_the_reference(case, dtype):
    inputs = on_device(**case.inputs) | {"dtype": dtype}
    assert torch.equal(dequantize(**inputs), reference(**inputs))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_over_several_programs(quant_type):
    shape, blocksize = (37, 192), 64
    generator = torch.Generator().manual_seed(1)
    n = math.prod(shape)
    packed = torch.randint(0, 256, (n // 2, 1), dtype=torch.uint8, generator=generator).to(DEVICE)
    absmax = torch.rand(n // blocksize, generator=generator).to(DEVICE)
    # A column of a wider buffer: bytes that do not lie side by side.
    wide = packed.expand(-1, 3).contiguous()[:, 1:2]
    for source in (packed, wide):
        args = (source, absmax, blocksize, shape, torch.bfloat16, quant_type)
        assert torch.equal(dequantize(*args), reference(*args))


def doubly_quantised(shape, dtype, quant_type):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    return quantize_4bit(weight, quant_type=quant_type, compress_statistics=True)


@EVERY_DTYPE
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (300, 64), (517, 192), (5, 7)])
def test_double_quantisation_is_undone_in_the_kernel(shape, quant_type, dtype):
    packed, state = doubly_quantised(shape, dtype, quant_type)
    outer = state.state2
    nested = Nested(outer.code.to(DEVICE), outer.absmax, state.offset, outer.blocksize)
    found = dequantize_nested(packed, state.absmax, nested, 64, shape, dtype, quant_type)
    assert torch.equal(found, reference(packed, scales(state), 64, shape, dtype, quant_type))
    if shape[1] % 64 == 0:
        assert torch.equal(found, dequantize_4bit(packed, state))
    assert torch.equal(found, dense(packed, state))


def test_wrong_outer_scales_are_refused():
    packed, state = doubly_quantised((300, 64), torch.float32, "nf4")
    outer = state.state2
    good = Nested(outer.code.to(DEVICE), outer.absmax, state.offset, outer.blocksize)
    for nested in (
        good._replace(outer=good.outer[:1]),
        good._replace(code=good.code[:16]),
        good._replace(offset=good.offset.bfloat16()),
    ):
        with pytest.raises(ConfigError, match="FG-KERNEL-002"):
            dequantize_nested(packed, state.absmax, nested, 64, (300, 64), torch.float32)


def test_dequantize_of_nothing():
    none = torch.empty(0, dtype=torch.uint8, device=DEVICE), torch.empty(0, device=DEVICE)
    assert dequantize(*none, 64, (0, 8), torch.float32).shape == (0, 8)


def test_what_does_not_fit_is_refused():
    packed = torch.zeros(32, dtype=torch.uint8, device=DEVICE)
    absmax = torch.ones(1, device=DEVICE)
    good = dict(packed=packed, absmax=absmax, blocksize=64, shape=(8, 8), dtype=torch.float32)
    assert dequantize(**good).shape == (8, 8)
    inputs = on_device(**loss_inputs(3, 4, 5))
    for call, code in (
        (lambda: dequantize(**good | {"dtype": torch.float64}), "001"),
        (lambda: dequantize(**good | {"shape": (8, 9)}), "002"),
        (lambda: dequantize(**good | {"blocksize": 63}), "002"),
        (lambda: dequantize(**good | {"blocksize": 32}), "002"),
        (lambda: dequantize(**good | {"packed": packed.int()}), "002"),
        (lambda: dequantize(**good | {"absmax": absmax.clone().requires_grad_()}), "002"),
        (lambda: dequantize(**good | {"quant_type": "int4"}), "003"),
        (lambda: linear_cross_entropy(**on_device(torch.float64, **inputs)), "001"),
        (lambda: linear_cross_entropy(**inputs | {"hidden": inputs["hidden"].bfloat16()}), "002"),
        (lambda: linear_cross_entropy(**inputs | {"labels": inputs["labels"][:2]}), "002"),
        (lambda: linear_cross_entropy(**inputs | {"hidden": inputs["hidden"][:, :3]}), "002"),
    ):
        with pytest.raises(ConfigError, match=f"FG-KERNEL-{code}"):
            call()
