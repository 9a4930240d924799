"""Gated gelu (tanh approximation) and its backward in one pass each, on bfloat16 rows.

What: loops for ``kernels._loops``, with the arguments of swiglu's. Constraint: arithmetic in
float32, one rounding. Shapes: t rows, f columns.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from finegraft.kernels._compile import halves, narrow, share, tanh, thread, wide


@njit(inline="always")
def _inner(g):
    return np.float32(0.7978845608) * (g + np.float32(0.044715) * g * g * g)


def forward(pointer):
    """gate, up [t, f], their row strides, out [t, f], t, f."""
    a = carray(pointer, (7,))
    rows, f = a[5], a[6]
    one, half = np.float32(1.0), np.float32(0.5)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        gate, up = halves(a[0] + 2 * row * a[2], f), halves(a[1] + 2 * row * a[3], f)
        out = halves(a[4] + 2 * row * f, f)
        for j in range(f):
            g = wide(gate[j])
            out[j] = narrow(half * g * (one + tanh(_inner(g))) * wide(up[j]))


def backward(pointer):
    """dout [t, f], gate, up [t, f], their row strides, dgate_up [t, 2f], t, f."""
    a = carray(pointer, (8,))
    rows, f = a[6], a[7]
    one, half = np.float32(1.0), np.float32(0.5)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        dout = halves(a[0] + 2 * row * f, f)
        gate, up = halves(a[1] + 2 * row * a[3], f), halves(a[2] + 2 * row * a[4], f)
        dgate, dup = halves(a[5] + 4 * row * f, f), halves(a[5] + 4 * row * f + 2 * f, f)
        for j in range(f):
            g, d = wide(gate[j]), wide(dout[j])
            t = tanh(_inner(g))
            slope = np.float32(0.7978845608) * (one + np.float32(0.134145) * g * g)
            derivative = half * (one + t) + half * g * (one - t * t) * slope
            dgate[j] = narrow(d * wide(up[j]) * derivative)
            dup[j] = narrow(d * half * g * (one + t))
