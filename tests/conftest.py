"""Shared settings: tiny models run fastest on one thread, and no test reaches a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1] / "src" / "finegraft" / "kernels"


def pytest_configure():
    """Forget compiled loops older than what they share; numba looks at their own file only."""
    newest = (KERNELS / "_compile.py").stat().st_mtime
    for kept in KERNELS.rglob("*.nb[ci]"):
        if kept.stat().st_mtime < newest:
            kept.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_models(request):
    threads = torch.get_num_threads()
    if "e2e" not in str(request.path):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
