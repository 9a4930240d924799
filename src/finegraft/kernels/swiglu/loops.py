"""Gated activation and its backward in one pass each, on bfloat16 rows.

What: loops for ``kernels._loops``; gate and up are columns of wider rows, and so are their
gradients. Constraint: arithmetic in float32, one rounding. Shapes: t rows, f columns.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from finegraft.kernels._compile import exp, halves, narrow, share, thread, wide


def forward(pointer):
    """gate, up [t, f], their row strides, out [t, f], t, f."""
    a = carray(pointer, (7,))
    rows, f = a[5], a[6]
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        gate, up = halves(a[0] + 2 * row * a[2], f), halves(a[1] + 2 * row * a[3], f)
        out = halves(a[4] + 2 * row * f, f)
        for j in range(f):
            g = wide(gate[j])
            out[j] = narrow(g / (np.float32(1.0) + exp(-g)) * wide(up[j]))


def backward(pointer):
    """dout [t, f], gate, up [t, f], their row strides, dgate_up [t, 2f], t, f."""
    a = carray(pointer, (8,))
    rows, f = a[6], a[7]
    one = np.float32(1.0)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        dout = halves(a[0] + 2 * row * f, f)
        gate, up = halves(a[1] + 2 * row * a[3], f), halves(a[2] + 2 * row * a[4], f)
        dgate, dup = halves(a[5] + 4 * row * f, f), halves(a[5] + 4 * row * f + 2 * f, f)
        for j in range(f):
            g, d = wide(gate[j]), wide(dout[j])
            s = one / (one + exp(-g))
            dgate[j] = narrow(d * wide(up[j]) * s * (one + g * (one - s)))
            dup[j] = narrow(d * g * s)
