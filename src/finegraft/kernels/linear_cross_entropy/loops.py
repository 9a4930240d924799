"""Cross-entropy of a chunk of logits and its gradient, in place, one row at a time.

What: a loop for ``kernels._loops`` on bfloat16 logits; a row of 49,152 stays in the second-level
cache between its passes. Constraint: arithmetic in float32, the sum as well. Shapes: c rows, v
vocabulary.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from finegraft.kernels._compile import (
    exp,
    halves,
    integers,
    narrow,
    real,
    share,
    singles,
    tanh,
    thread,
    wide,
)


def softmax_gradient(pointer):
    """logits [c, v], labels [c], losses [c], c, v, softcap or 0, logit scale, whether a gradient
    is wanted; the logits become d losses / d (hidden @ weight.T).
    """
    a = carray(pointer, (8,))
    rows, v, cap, scale = a[3], a[4], real(a[5]), real(a[6])
    labels, losses = integers(a[1], rows), singles(a[2], rows)
    one = np.float32(1.0)
    me, threads = thread()
    begin, end = share(rows, me, threads)
    for row in range(begin, end):
        logits = halves(a[0] + 2 * row * v, v)
        label = labels[row]
        target = wide(logits[label]) * scale
        if cap > 0:
            target = cap * tanh(target / cap)
        largest = np.float32(-3e38)
        if cap > 0:
            largest = cap  # nothing is above it, and 2 * cap is far from overflowing
        else:
            for j in range(v):
                value = wide(logits[j]) * scale
                largest = value if value > largest else largest
        total = np.float32(0.0)
        if cap > 0:
            for j in range(v):
                total += exp(cap * tanh(wide(logits[j]) * scale / cap) - largest)
        else:
            for j in range(v):
                total += exp(wide(logits[j]) * scale - largest)
        log_sum = np.float32(np.log(total)) + largest
        losses[row] = log_sum - target
        if a[7] == 0:
            continue
        share_of_one = one / total
        if cap > 0:
            for j in range(v):
                t = tanh(wide(logits[j]) * scale / cap)
                p = exp(cap * t - largest) * share_of_one
                logits[j] = narrow(p * (one - t * t) * scale)
            t = target / cap
            slope = (one - t * t) * scale
        else:
            for j in range(v):
                logits[j] = narrow(exp(wide(logits[j]) * scale - largest) * share_of_one * scale)
            slope = scale
        p = exp(target - largest) * share_of_one
        logits[label] = narrow((p - one) * slope)
