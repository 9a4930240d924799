"""Random bits from a counter, and dropout by them, in one pass each.

What: loops for ``kernels._loops``. How: word i is the i-th output of SplitMix64 from a given seed,
so threads need no state of their own. Constraint: not for cryptography; the sequence passes the
usual statistical batteries.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from finegraft.kernels._compile import halves, integers, narrow, real, share, thread, wide


def fill(pointer):
    """words [n] int64, seed, n."""
    a = carray(pointer, (3,))
    me, threads = thread()
    first, end = share(a[2], me, threads)
    n = end - first  # counting from zero: LLVM vectorises no loop whose index may be negative
    words = integers(a[0] + 8 * first, n)
    seed = np.uint64(a[1]) + np.uint64(first) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(n):
        z = seed + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words[i] = np.int64(z ^ (z >> np.uint64(31)))


def apply(pointer):
    """x, noise, out [n], n, least, scale."""
    a = carray(pointer, (6,))
    least, scale = np.int32(a[4]), real(a[5])
    me, threads = thread()
    first, end = share(a[3], me, threads)
    n = end - first
    x, noise = halves(a[0] + 2 * first, n), halves(a[1] + 2 * first, n)
    out = halves(a[2] + 2 * first, n)
    for i in range(n):
        kept = np.int32(np.int16(noise[i])) >= least
        out[i] = narrow(wide(x[i]) * scale if kept else np.float32(0.0))
