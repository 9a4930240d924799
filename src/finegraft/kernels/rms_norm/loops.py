"""RMS norm and its residual add, one pass forward and one backward, on bfloat16 rows.

What: loops for ``kernels._loops``; shared with ``add_rms_norm``. Constraint: arithmetic in float32,
one rounding at the end, where the composition rounds twice. Shapes: t rows, d columns.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from finegraft.kernels._compile import halves, narrow, real, share, singles, thread, wide


def forward(pointer):
    """x, delta or 0, weight [d], total, y, factor [t], t, d, eps, offset.

    Without delta, total is x itself.
    """
    a = carray(pointer, (10,))
    rows, d, eps, offset = a[6], a[7], real(a[8]), real(a[9])
    weight, factor = halves(a[2], d), singles(a[5], rows)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        at = 2 * row * d
        x, delta = halves(a[0] + at, d), halves(a[1] + at, d)
        total, y = halves(a[3] + at, d), halves(a[4] + at, d)
        if a[1] != 0:
            for j in range(d):
                total[j] = narrow(wide(x[j]) + wide(delta[j]))
        square = np.float32(0.0)
        for j in range(d):
            square += wide(total[j]) * wide(total[j])
        scale = np.float32(1.0) / np.sqrt(square / np.float32(d) + eps)
        factor[row] = scale
        for j in range(d):
            y[j] = narrow(wide(total[j]) * scale * (wide(weight[j]) + offset))


def backward(pointer):
    """dy, dtotal or 0, total, weight [d], factor [t], dx, t, d, offset."""
    a = carray(pointer, (9,))
    rows, d, offset = a[6], a[7], real(a[8])
    weight, factor = halves(a[3], d), singles(a[4], rows)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        at = 2 * row * d
        dy, residual = halves(a[0] + at, d), halves(a[1] + at, d)
        total, dx = halves(a[2] + at, d), halves(a[5] + at, d)
        scale = factor[row]
        along = np.float32(0.0)
        for j in range(d):
            along += wide(dy[j]) * (wide(weight[j]) + offset) * wide(total[j])
        along = along * scale * scale / np.float32(d)
        if a[1] != 0:
            for j in range(d):
                g = wide(dy[j]) * (wide(weight[j]) + offset) - wide(total[j]) * along
                dx[j] = narrow(g * scale + wide(residual[j]))
        else:
            for j in range(d):
                g = wide(dy[j]) * (wide(weight[j]) + offset) - wide(total[j]) * along
                dx[j] = narrow(g * scale)
