"""Layer norm with residual and dropout, one pass forward and one backward, on bfloat16 rows.

What: loops for ``kernels._loops``. Constraint: arithmetic in float32, one rounding a result.
Shapes: t rows, d columns.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from finegraft.kernels._compile import halves, narrow, real, share, singles, thread, wide


def forward(pointer):
    """x, residual or 0, noise or 0, weight, bias, total, y, mean, factor, t, d, eps, least, scale.

    Without residual and noise, total is x itself and is not written.
    """
    a = carray(pointer, (14,))
    rows, d, eps, least, scale = a[9], a[10], real(a[11]), np.int32(a[12]), real(a[13])
    weight, bias = halves(a[3], d), halves(a[4], d)
    means, factors = singles(a[7], rows), singles(a[8], rows)
    count = np.float32(d)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        at = 2 * row * d
        x, residual, noise = halves(a[0] + at, d), halves(a[1] + at, d), halves(a[2] + at, d)
        total, y = halves(a[5] + at, d), halves(a[6] + at, d)
        if a[1] != 0 and a[2] != 0:
            for j in range(d):
                kept = np.int32(np.int16(noise[j])) >= least
                branch = wide(x[j]) * scale if kept else np.float32(0.0)
                total[j] = narrow(branch + wide(residual[j]))
        elif a[1] != 0:
            for j in range(d):
                total[j] = narrow(wide(x[j]) + wide(residual[j]))
        elif a[2] != 0:
            for j in range(d):
                kept = np.int32(np.int16(noise[j])) >= least
                total[j] = narrow(wide(x[j]) * scale if kept else np.float32(0.0))
        add = np.float32(0.0)
        for j in range(d):
            add += wide(total[j])
        mean = add / count
        square = np.float32(0.0)
        for j in range(d):
            away = wide(total[j]) - mean
            square += away * away
        factor = np.float32(1.0) / np.sqrt(square / count + eps)
        means[row] = mean
        factors[row] = factor
        for j in range(d):
            y[j] = narrow((wide(total[j]) - mean) * factor * wide(weight[j]) + wide(bias[j]))


def backward(pointer):
    """dy, total, weight, mean, factor, noise or 0, dtotal, dx or 0, t, d, least, scale."""
    a = carray(pointer, (12,))
    rows, d, least, scale = a[8], a[9], np.int32(a[10]), real(a[11])
    weight, means, factors = halves(a[2], d), singles(a[3], rows), singles(a[4], rows)
    count = np.float32(d)
    me, threads = thread()
    first, end = share(rows, me, threads)
    for row in range(first, end):
        at = 2 * row * d
        dy, total, noise = halves(a[0] + at, d), halves(a[1] + at, d), halves(a[5] + at, d)
        out, dx = halves(a[6] + at, d), halves(a[7] + at, d)
        mean, factor = means[row], factors[row]
        flat = np.float32(0.0)
        along = np.float32(0.0)
        for j in range(d):
            g = wide(dy[j]) * wide(weight[j])
            flat += g
            along += g * ((wide(total[j]) - mean) * factor)
        flat = flat / count
        along = along / count
        for j in range(d):
            normed = (wide(total[j]) - mean) * factor
            g = wide(dy[j]) * wide(weight[j])
            out[j] = narrow((g - flat - normed * along) * factor)
        if a[7] != 0:
            for j in range(d):
                kept = np.int32(np.int16(noise[j])) >= least
                dx[j] = narrow(wide(out[j]) * scale if kept else np.float32(0.0))
