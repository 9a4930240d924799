"""Softmax of score rectangles with dropout, and its backward, on bfloat16.

What: loops for ``kernels._loops`` that work in place. Constraint: arithmetic in float32, one
rounding; each thread owns some rows.

Shapes: s rows of scores, a rows of scores for each row of the batch, l keys of the longest row of a
bucket.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from finegraft.kernels._compile import (
    bits_of,
    exp,
    float_of,
    halves,
    integers,
    narrow,
    real,
    share,
    singles,
    thread,
    wide,
)

_ZERO = np.float32(0.0)
_FAR = np.float32(1e30)  # marks filling
# Rows that are worked on together: a loop over one row is too short to be vectorised well.
_GROUP = 32


@njit(inline="always")
def _ordered(x):
    """int32 that orders like the float: LLVM vectorises a maximum of integers, not of floats."""
    bits = np.int32(bits_of(x))
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(inline="always")
def _unordered(order):
    return float_of(np.uint32(order ^ ((order >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@njit(inline="always")
def _kept(noise, least):
    return np.int32(np.int16(noise)) >= least


@njit(inline="always")
def _fill(address, size, value):
    x = singles(address, size)
    for j in range(size):
        x[j] = value


@njit(inline="always")
def _sum(address, size):
    """Of a multiple of four numbers, in four chains: one chain waits for itself."""
    s0 = s1 = s2 = s3 = _ZERO
    for j in range(0, size, 4):
        x = singles(address + 4 * j, 4)
        s0 += x[0]
        s1 += x[1]
        s2 += x[2]
        s3 += x[3]
    return (s0 + s1) + (s2 + s3)


def softmax(pointer):
    """scores to weights, dropped, noise or 0, sizes, scratch [threads, 2, 32, l] float32, s, a, l,
    scale, least, factor; l is a multiple of 8.
    """
    a = carray(pointer, (11,))
    rows, asked, length = a[5], a[6], a[7]
    scale, least, factor = real(a[8]), np.int32(a[9]), real(a[10])
    sizes = integers(a[3], rows // asked)
    me, threads = thread()
    powers_at = a[4] + 4 * me * 2 * _GROUP * length
    shifts_at = powers_at + 4 * _GROUP * length
    first, end = share(rows, me, threads)
    for group in range(first, end, _GROUP):
        count = min(end - group, _GROUP)
        at, n = 2 * group * length, count * length
        for row in range(count):
            size = sizes[(group + row) // asked]
            line = halves(a[0] + at + 2 * row * length, length)
            most = np.int32(-(2**31))
            for j in range(size):
                most = max(most, _ordered(wide(line[j])))
            to = shifts_at + 4 * row * length
            _fill(to, size, _unordered(most) * scale)
            _fill(to + 4 * size, length - size, _FAR)
        scores, dropped = halves(a[0] + at, n), halves(a[1] + at, n)
        noise = halves(a[2] + at, n)
        powers, shifts = singles(powers_at, n), singles(shifts_at, n)
        for j in range(n):
            power = exp(wide(scores[j]) * scale - shifts[j])
            powers[j] = power if shifts[j] < _FAR else _ZERO  # e**-87 would become denormal: slow
        for row in range(count):
            total = _sum(powers_at + 4 * row * length, length)
            _fill(shifts_at + 4 * row * length, length, np.float32(1.0) / total)
        for j in range(n):
            scores[j] = narrow(powers[j] * shifts[j])
        if a[2] != 0:
            for j in range(n):
                kept = powers[j] * shifts[j] * factor
                dropped[j] = narrow(kept if _kept(noise[j], least) else _ZERO)


def softmax_backward(pointer):
    """Gradient of dropped to that of scores, weights, noise or 0, scratch as above, s, l, scale,
    least, factor; l is a multiple of 8.
    """
    a = carray(pointer, (9,))
    rows, length = a[4], a[5]
    scale, least, factor = real(a[6]), np.int32(a[7]), real(a[8])
    me, threads = thread()
    parts_at = a[3] + 4 * me * 2 * _GROUP * length
    sums_at = parts_at + 4 * _GROUP * length
    first, end = share(rows, me, threads)
    for group in range(first, end, _GROUP):
        count = min(end - group, _GROUP)
        at, n = 2 * group * length, count * length
        grad, weights, noise = halves(a[0] + at, n), halves(a[1] + at, n), halves(a[2] + at, n)
        parts, sums = singles(parts_at, n), singles(sums_at, n)
        if a[2] != 0:
            for j in range(n):
                kept = wide(grad[j]) * factor * wide(weights[j])
                parts[j] = kept if _kept(noise[j], least) else _ZERO
        else:
            for j in range(n):
                parts[j] = wide(grad[j]) * wide(weights[j])
        for row in range(count):
            along = _sum(parts_at + 4 * row * length, length)
            _fill(sums_at + 4 * row * length, length, along)
        for j in range(n):
            grad[j] = narrow((parts[j] - sums[j] * wide(weights[j])) * scale)
