"""Dense bfloat16 weights from 4-bit ones in one pass, double quantisation undone on the way.

What: a loop for ``kernels._loops``. How: a block's 16 possible weights are computed and rounded
once; its values are then looked up, 64 at a time where the processor can permute 16-bit lanes
(AVX512-BW), else one by one. Constraint: bit-equal to the reference; what could be fused into one
rounding is kept apart. Shapes: n values in blocks of ``size``, m blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.extending import intrinsic

from finegraft.kernels._compile import halves, narrow, octets, share, singles, thread

_LANES = 32  # 16-bit lanes of a register
_PERMUTES = bool(binding.get_host_cpu_features().get("avx512bw"))


@intrinsic
def _look_up_64(typing: Any, table: Any, packed: Any, out: Any) -> Any:
    """32 packed bytes to 64 halves; all three are addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        byte, half, word = ir.IntType(8), ir.IntType(16), ir.IntType(32)
        table_at, packed_at, out_at = values
        lanes, wide = ir.VectorType(half, _LANES), ir.VectorType(word, _LANES)

        def load(kind: Any, at: Any) -> Any:
            found = builder.load(builder.inttoptr(at, kind.as_pointer()))
            found.align = 1
            return found

        def splat(kind: Any, value: int) -> Any:
            return ir.Constant(ir.VectorType(kind, _LANES), [value] * _LANES)

        permute = builder.module.declare_intrinsic(
            "llvm.x86.avx512.permvar.hi.512", (), ir.FunctionType(lanes, [lanes, lanes])
        )
        sixteen = load(ir.VectorType(half, 16), table_at)
        twice = ir.Constant(wide, [i % 16 for i in range(_LANES)])
        known = builder.shuffle_vector(sixteen, sixteen, twice)
        pairs = builder.zext(load(ir.VectorType(byte, _LANES), packed_at), lanes)
        early = builder.call(permute, [known, builder.lshr(pairs, splat(half, 4))])
        late = builder.call(permute, [known, builder.and_(pairs, splat(half, 15))])
        later = builder.shl(builder.zext(late, wide), splat(word, 16))
        both = builder.or_(builder.zext(early, wide), later)
        builder.store(both, builder.inttoptr(out_at, wide.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(inline="always")
def _one_by_one(table_at, packed_at, out_at, values):
    table, packed = halves(table_at, 16), octets(packed_at, (values + 1) // 2)
    out = halves(out_at, values)
    for j in range(values // 2):
        out[2 * j] = table[packed[j] >> 4]
        out[2 * j + 1] = table[packed[j] & 15]
    if values % 2:
        out[values - 1] = table[packed[values // 2] >> 4]


if _PERMUTES:

    @njit(inline="always")
    def _expand(table_at, packed_at, out_at, values):
        whole = values // 64
        for k in range(whole):
            _look_up_64(table_at, packed_at + 32 * k, out_at + 128 * k)
        if values % 64:
            rest = values - 64 * whole
            _one_by_one(table_at, packed_at + 32 * whole, out_at + 128 * whole, rest)

else:
    _expand = _one_by_one


def dense(pointer):
    """packed, scales, code, outer scales, offset, values, scratch, out; size, outer size, n.

    Without a code (0) the scales [m] are float32; with one they are bytes, positions in it.
    Scratch holds 32 halves a thread.
    """
    a = carray(pointer, (11,))
    size, outer_size, n = a[8], a[9], a[10]
    blocks = (n + size - 1) // size
    values = singles(a[5], 16)
    me, threads = thread()
    table_at = a[6] + 64 * me
    table = halves(table_at, 16)
    first, end = share(blocks, me, threads)
    plain, coded = singles(a[1], blocks), octets(a[1], blocks)
    code, outer, offset = singles(a[2], 256), singles(a[3], blocks), singles(a[4], 1)
    group = first // outer_size
    for block in range(first, end):
        if a[2] == 0:
            scale = plain[block]
        else:
            group += block == (group + 1) * outer_size
            # in float64 the product is exact, so that no fused addition can change its rounding
            exact = np.float64(code[coded[block]]) * np.float64(outer[group])
            scale = np.float32(exact) + offset[0]
        for j in range(16):
            table[j] = narrow(values[j] * scale)
        start = block * size
        _expand(table_at, a[0] + start // 2, a[7] + 2 * start, min(size, n - start))
