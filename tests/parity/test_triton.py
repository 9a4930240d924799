"""The parity of every Triton kernel, in processes of their own.

Triton decides when it is imported whether its kernels are interpreted, and transformers may import
it, so the tests are in ``triton_*.py``, which pytest does not collect by itself: each file is run
here in the interpreter and, where there is a GPU, compiled as well. What the interpreter accepts
and the compiler does not is found by ``ahead_of_time.py``, which needs no GPU. To see one alone:
``TRITON_INTERPRET=1 pytest tests/parity/triton_elementwise.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from _compare import run_file

FILES = sorted(Path(__file__).parent.glob("triton_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_the_interpreter(path, tmp_path):
    run_file(path, tmp_path, interpreted=True)


@pytest.mark.cuda
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_compiled(path, tmp_path):
    run_file(path, tmp_path, interpreted=False)


def test_for_gpus_that_are_not_here(tmp_path):
    run_file(Path(__file__).with_name("ahead_of_time.py"), tmp_path, interpreted=False)


def test_every_triton_file_is_tested():
    kernels = Path(__file__).parents[2] / "src" / "finegraft" / "kernels"
    tests = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("*triton*.py")]
    ops = sorted(path.parent.name for path in kernels.glob("*/triton.py"))
    assert ops
    for op in ops:
        assert any(f"finegraft.kernels.{op}.triton import" in text for text in tests), op


IMPORT_ALL = """
import importlib, pkgutil, sys, torch
import finegraft.kernels as kernels
before = "triton" in sys.modules
for module in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"{kernels.__name__}.{module.name}")
sys.exit("triton" in sys.modules and not before)
"""


def test_importing_the_kernels_does_not_import_triton():
    assert subprocess.run([sys.executable, "-c", IMPORT_ALL]).returncode == 0
