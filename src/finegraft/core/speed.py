"""How fast this computer multiplies matrices, measured.

What: ``gflops`` times square products. How: the best of what fits into a fraction of a second,
because other programs only ever make a product slower. Constraint: nothing is measured at import.
Trade-off: products of 1,024 columns are smaller than a large model's, so the rate is a lower bound.
"""

from __future__ import annotations

import time
from typing import Any

MATMUL_SIZE = 1024
MATMUL_SECONDS = 0.7


def gflops(dtype: Any, device: str, seconds: float = MATMUL_SECONDS) -> float:
    """Best measured rate of a square product, in GFLOP/s.

    Args:
        dtype: Of the factors.
        device: ``cpu`` or ``cuda``.
        seconds: How long to measure.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best / 1e9
