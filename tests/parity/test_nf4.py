"""4-bit weights made dense: bit for bit what bitsandbytes makes of them on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit

from finegraft.core.errors import ConfigError, ModelError
from finegraft.kernels.nf4 import OP, dense, dequantize, reference, scales

TYPES = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def quantised(shape, dtype=torch.float32, **settings):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    return weight, *quantize_4bit(weight, **settings)


@TYPES
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((64, 128), 64), ((7, 256), 128), ((33, 64), 64), ((31, 33), 64), ((40, 4096), 4096)],
)
def test_bit_equal_to_bitsandbytes(shape, blocksize, dtype, nested, quant_type):
    _, packed, state = quantised(
        shape, dtype, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    want = dequantize_4bit(packed, state)
    args = (packed, scales(state), blocksize, shape, dtype, quant_type)
    for found in (dense(packed, state), reference(*args), dequantize(*args)):
        assert found.dtype == dtype and torch.equal(found, want)


@TYPES
@pytest.mark.parametrize("shape", [(64, 96), (5, 7), (3, 1000), (1, 1)])
def test_rows_that_end_inside_a_block(shape, quant_type):
    # bitsandbytes 0.50.2 scales some of these by a neighbouring block's maximum.
    weight, packed, state = quantised(shape, quant_type=quant_type)
    found = dense(packed, state)
    assert torch.equal(found, reference(packed, scales(state), 64, shape, weight.dtype, quant_type))
    # Half of the widest step of either table, times the largest weight of its block.
    flat, largest = (found - weight).abs().reshape(-1), weight.abs().reshape(-1)
    for block in range(math.ceil(flat.numel() / 64)):
        part = slice(64 * block, 64 * block + 64)
        assert flat[part].max() <= 0.17 * largest[part].max()


@TYPES
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (5, 7), (3, 1000), (1, 1), (300, 70), (129, 576)])
def test_one_compiled_pass_is_bit_equal(shape, nested, quant_type):
    _, packed, state = quantised(
        shape, torch.bfloat16, quant_type=quant_type, compress_statistics=nested
    )
    want = reference(packed, scales(state), state.blocksize, shape, torch.bfloat16, quant_type)
    assert torch.equal(dense(packed, state), want)
    around = torch.full((shape[0] + 2, shape[1]), 7.0, dtype=torch.bfloat16)
    dense(packed, state, out=around[1:-1])
    assert torch.equal(around[1:-1], want) and (around[[0, -1]] == 7.0).all()


def test_another_dtype_than_the_one_it_was_quantised_from():
    _, packed, state = quantised((8, 64), torch.float32, quant_type="nf4")
    found = dense(packed, state, torch.bfloat16)
    assert torch.equal(found, dequantize_4bit(packed, state).bfloat16())


def layer(**settings):
    torch.manual_seed(0)
    made = Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, **settings)
    return made.to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_a_parameter_in_any_storage(storage):
    weight = layer(quant_type="nf4", quant_storage=storage).weight
    found = dense(weight)
    assert not found.requires_grad and found.shape == (128, 64)
    assert torch.equal(found, dequantize_4bit(weight.data, weight.quant_state))


def test_train_and_eval_in_any_order():
    quantized = layer(quant_type="nf4")
    quantized.support_avx512bf16_for_cpu = False
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    before = dense(quantized.weight)
    for mode in (True, False, True, False):
        quantized.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(quantized(x), x @ before.t())
        assert torch.equal(dense(quantized.weight), before)


def test_after_an_evaluation_that_was_not_protected():
    quantized = layer(quant_type="nf4").eval().bfloat16()
    before = dense(quantized.weight)
    with torch.no_grad():
        quantized(torch.ones(1, 64, dtype=torch.bfloat16))
    if getattr(quantized.weight.quant_state, "packing_format_for_cpu", False):  # AVX512-BF16
        with pytest.raises(ModelError, match="FG-MODEL-014"):
            dense(quantized.weight)
    else:
        assert torch.equal(dense(quantized.weight), before)


def test_weights_that_an_evaluation_repacked_are_refused():
    weight = layer(quant_type="nf4").weight
    weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets when it repacks
    with pytest.raises(ModelError, match="FG-MODEL-014"):
        dense(weight)


def test_a_weight_that_is_not_quantised_is_refused():
    with pytest.raises(ModelError, match="FG-KERNEL-004"):
        dense(torch.zeros(4, 4))


def test_an_unknown_type_is_refused():
    _, packed, state = quantised((8, 64), quant_type="nf4")
    state.quant_type = "int4"
    with pytest.raises(ConfigError, match="FG-KERNEL-003"):
        dense(packed, state)
    with pytest.raises(ConfigError, match="FG-KERNEL-003"):
        dequantize(packed, scales(state), 64, (8, 64), torch.float32, "int4")


@pytest.mark.parametrize("case", OP.cases(), ids=lambda c: c.label)
def test_pairs_are_bit_equal_to_single_values(case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {**case.inputs, "absmax": case.inputs["absmax"].float(), "dtype": dtype}
        for function in OP.implementations.values():
            assert torch.equal(function(**inputs), OP.reference(**inputs))
