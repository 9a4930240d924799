"""Dequantise NF4 and FP4 in Triton: half a byte read, one value written.

How: a program takes some blocks, looks the halves of their bytes up in a table of 16 floats, which
stays in the first-level cache, scales in float32 and writes the interleaved values in one go.
Constraint: blocks of a power of two, as bitsandbytes has them; no gradients, the weights are
frozen. Trade-off: the table is read by address instead of being a chain of 15 selections,
which would cost more instructions than the memory traffic leaves time for.

Source: QLoRA, https://arxiv.org/abs/2305.14314. Shapes: n values, m blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from finegraft.kernels import _gpu
from finegraft.kernels.nf4 import table

__all__ = ["Nested", "dequantize", "dequantize_nested"]

# 16 values a thread on 4 warps: two vector stores of 16 bytes in 16-bit dtypes.
_VALUES = 2048


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Return the dense weight; carries no gradient.

    Args:
        packed: [(n + 1) / 2] bytes, any shape.
        absmax: [m], float32.
        blocksize: Values of a block, a power of two.
        shape: Of the result, n values.
        dtype: Of the result: float32, bfloat16 or float16.
        quant_type: ``nf4`` or ``fp4``.

    Returns:
        Tensor of ``shape``, bit-equal to bitsandbytes' own.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002,
            sizes that do not belong together, or a gradient asked for ``absmax``; FG-KERNEL-003,
            an unknown 4-bit type.

    Source:
        https://arxiv.org/abs/2305.14314
    """
    _gpu.require("nf4", absmax)
    _gpu.require_shape(
        "nf4",
        not (torch.is_grad_enabled() and absmax.requires_grad),
        "absmax asks for a gradient",
        "frozen scales",
    )
    absmax = absmax.float().contiguous()
    return _launch(packed, absmax, None, blocksize, shape, dtype, quant_type)


class Nested(NamedTuple):
    """How the scales of blocks are themselves quantised: ``code[absmax] * outer + offset``.

    Attributes:
        code: [256], float32, values of the 8-bit scales.
        outer: Float32, one for every ``blocksize`` scales.
        offset: Float32, one value.
        blocksize: Scales that share one outer scale, a power of two.
    """

    code: torch.Tensor
    outer: torch.Tensor
    offset: torch.Tensor
    blocksize: int


def dequantize_nested(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: Nested,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Return the dense weight of a doubly quantised one, the scales undone in the same kernel.

    Five launches on [m] scales less than undoing them first.

    Args:
        packed: As in ``dequantize``.
        absmax: [m], uint8.
        nested: What the scales mean.
        blocksize: As in ``dequantize``, and the rest too.

    Returns:
        Tensor of ``shape``, bit-equal to bitsandbytes' own.

    Raises:
        ConfigError: As ``dequantize``.

    Source:
        https://arxiv.org/abs/2305.14314, section 3
    """
    _gpu.require("nf4", absmax, nested.code, nested.outer, nested.offset)
    _gpu.require_shape(
        "nf4",
        absmax.dtype == torch.uint8
        and nested.code.numel() == 256
        and nested.outer.numel() == _gpu.ceil_div(absmax.numel(), nested.blocksize)
        and all(x.dtype == torch.float32 for x in nested[:3]),
        f"{absmax.numel()} scales of {absmax.dtype}, {nested.outer.numel()} outer ones",
        f"scales of uint8, a float32 one for each {nested.blocksize} of them",
    )
    return _launch(packed, absmax.contiguous(), nested, blocksize, shape, dtype, quant_type)


def _launch(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: Nested | None,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str,
) -> torch.Tensor:
    n, m = math.prod(shape), absmax.numel()
    out = packed.new_empty(tuple(shape), dtype=dtype)
    _gpu.require("nf4", packed, absmax, out)
    _gpu.require_shape(
        "nf4",
        packed.dtype == torch.uint8
        and blocksize >= 2
        and blocksize == _gpu.power_of_2(blocksize)
        and packed.numel() == _gpu.ceil_div(n, 2)
        and m == _gpu.ceil_div(n, blocksize),
        f"{packed.numel()} values of {packed.dtype} and {m} scales in blocks of {blocksize} for "
        f"{n} values",
        "two values a byte of uint8, one scale for each block, of a power of two",
    )
    values = table(quant_type, packed.device, torch.float32)
    if n:
        blocks = max(_VALUES // blocksize, 1)
        code, outer, offset, share = nested or (values, values, values, 1)
        with torch.cuda.device_of(packed):
            _kernel[(_gpu.ceil_div(m, blocks),)](
                packed.contiguous(), absmax, code, outer, offset, values, out, n, packed.numel(),
                m, NESTED=nested is not None, SHARE=share, BLOCKS=blocks, BYTES=blocksize // 2,
                num_warps=_gpu.warps(blocks * blocksize),
                # Product and offset round one after the other, as they do in bitsandbytes.
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


@triton.jit
def _kernel(
    packed, absmax, code, outer, offset, values, out, n, size, m, NESTED: tl.constexpr,
    SHARE: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    # A row of the tile is a block of values, so that each scale is read once.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]  # [BLOCKS, 1]
    at = block * BYTES + tl.arange(0, BYTES)[None, :]  # [BLOCKS, BYTES]
    byte = tl.load(packed + at, mask=at < size, other=0).to(tl.int32)
    scale = tl.load(absmax + block, mask=block < m, other=0)
    if NESTED:
        wide = tl.load(outer + block // SHARE, mask=block < m, other=0.0)
        scale = tl.load(code + scale.to(tl.int32)) * wide + tl.load(offset)
    both = tl.interleave(tl.load(values + (byte >> 4)), tl.load(values + (byte & 15))) * scale
    to = block * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]  # [BLOCKS, 2 * BYTES]
    tl.store(out + to, both.to(out.dtype.element_ty), mask=to < n)
