"""Moving heads between a flat batch and rectangles of documents, rotating them on the way.

What: loops for ``kernels._loops`` on bfloat16. A slot is a place in the rectangle [n, l]; its row
in the flat batch is given, or -1 for filling, which is written as zeros and never read back.
Constraint: each thread owns some slots; no two slots have the same row. Trade-off: compositions of
index_select, permute and rotation read and write q and k four times, this once.

Shapes: t tokens, n documents of l tokens, k key heads, g query heads of a key head, f features,
r rotated pairs of features.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from finegraft.kernels._compile import (
    exp,
    halves,
    integers,
    narrow,
    real,
    share,
    singles,
    thread,
    wide,
)


@njit(inline="always")
def _rotated(x, y, cos, sin, pairs, f, sign):
    if pairs == 0:  # a loop that starts at zero, or it would not be vectorised
        for j in range(f):
            y[j] = x[j]
        return
    for j in range(pairs):
        c, s = wide(cos[j]), wide(sin[j]) * sign
        first, second = wide(x[j]), wide(x[pairs + j])
        y[j] = narrow(first * c - second * s)
        y[pairs + j] = narrow(second * c + first * s)
    for j in range(2 * pairs, f):
        y[j] = x[j]


@njit(inline="always")
def _at(head, document, place, n, groups, length):
    """Index in [k, n, g, l] of a head's place in a document."""
    key, group = head // groups, head % groups
    return ((key * n + document) * groups + group) * length + place


def lift(pointer):
    """x [t, k * g, f] and its row stride, slots [n * l], lifted [k, n, g, l, f], n, l, k, g, f,
    cos and sin [t, r] or 0, r.
    """
    a = carray(pointer, (12,))
    n, length, keys, groups, f, pairs = a[4], a[5], a[6], a[7], a[8], a[11]
    slots = integers(a[2], n * length)
    me, threads = thread()
    begin, end = share(n * length, me, threads)
    for slot in range(begin, end):
        row = slots[slot]
        document, place = slot // length, slot % length
        for head in range(keys * groups):
            to = _at(head, document, place, n, groups, length) * f
            y = halves(a[3] + 2 * to, f)
            if row < 0:
                for j in range(f):
                    y[j] = np.uint16(0)
                continue
            x = halves(a[0] + 2 * (row * a[1] + head * f), f)
            cos, sin = halves(a[9] + 2 * row * pairs, pairs), halves(a[10] + 2 * row * pairs, pairs)
            _rotated(x, y, cos, sin, pairs, f, np.float32(1.0))


def lower(pointer):
    """The way back: lifted, slots, x and its row stride, n, l, k, g, f, cos and sin or 0, r."""
    a = carray(pointer, (12,))
    n, length, keys, groups, f, pairs = a[4], a[5], a[6], a[7], a[8], a[11]
    slots = integers(a[1], n * length)
    me, threads = thread()
    begin, end = share(n * length, me, threads)
    for slot in range(begin, end):
        row = slots[slot]
        if row < 0:
            continue
        document, place = slot // length, slot % length
        cos, sin = halves(a[9] + 2 * row * pairs, pairs), halves(a[10] + 2 * row * pairs, pairs)
        for head in range(keys * groups):
            at = _at(head, document, place, n, groups, length) * f
            x = halves(a[0] + 2 * at, f)
            y = halves(a[2] + 2 * (row * a[3] + head * f), f)
            _rotated(x, y, cos, sin, pairs, f, np.float32(-1.0))


def score_gradient(pointer):
    """scores, dp [k, g * c, s], lse and delta [k * g, l], k, g, c, s, l, first place, scale.

    The scores become probabilities and dp the gradient of the unscaled products, in place; the
    block's query i stands at ``first place + i`` and sees no key behind itself.
    """
    a = carray(pointer, (11,))
    keys, groups, queries, seen, length, start = a[4], a[5], a[6], a[7], a[8], a[9]
    scale = real(a[10])
    lse, delta = singles(a[2], keys * groups * length), singles(a[3], keys * groups * length)
    me, threads = thread()
    begin, end = share(keys * groups * queries, me, threads)
    for row in range(begin, end):
        head, query = row // queries, row % queries
        high = lse[head * length + start + query]
        low = delta[head * length + start + query]
        p, ds = halves(a[0] + 2 * row * seen, seen), halves(a[1] + 2 * row * seen, seen)
        visible = start + query + 1
        for j in range(visible):
            value = exp(wide(p[j]) * scale - high)
            ds[j] = narrow(value * (wide(ds[j]) - low) * scale)
            p[j] = narrow(value)
        hidden_p, hidden_ds = (
            halves(a[0] + 2 * (row * seen + visible), seen - visible),
            halves(a[1] + 2 * (row * seen + visible), seen - visible),
        )
        for j in range(seen - visible):
            hidden_p[j] = np.uint16(0)
            hidden_ds[j] = np.uint16(0)
