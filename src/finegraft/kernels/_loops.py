"""Compiled row loops for CPUs, run on torch's own threads.

What: a kernel is a Python function over raw pointers that numba compiles to machine code, called on
every thread of torch's OpenMP pool. How: libgomp, which torch has loaded, is asked for
a parallel region, so that no second pool competes for the cores (two pools that spin cost half of
the speed). Constraint: where numba or libgomp is missing, or a tensor is not bfloat16, callers take
their torch composition; ``refusal`` says why. Trade-off: the first use compiles for 0.3 to 0.5 s
a kernel, kept on the disk by numba afterwards.

Why: an elementwise operation on 1,024 x 1,536 numbers costs as much as reading them, and torch
reads and writes them once per operation. One pass over silu(gate) * up and its backward takes half
the time of the composition.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import struct
from collections.abc import Sequence
from typing import Any

import torch

# Fewer numbers than this are not worth waking the other threads for: it takes about 3 us.
_SERIAL_ELEMENTS = 4096


@functools.cache
def missing() -> str | None:
    """Why this machine runs no compiled loops, or None."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    try:
        gomp = ctypes.CDLL("libgomp.so.1", mode=getattr(ctypes, "RTLD_NOLOAD", 4) | 2)
    except OSError:
        return "torch's threads are not libgomp's"
    return None if hasattr(gomp, "GOMP_parallel") else "libgomp has no GOMP_parallel"


def refusal(*tensors: torch.Tensor | None) -> str | None:
    """Why these tensors take the torch composition, or None; rows must lie densely."""
    reason = missing()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype != torch.bfloat16:
            return f"{tensor.dtype} on {tensor.device.type}"
        if tensor.dim() and tensor.stride(-1) != 1:
            return "rows that are not dense"
    return None


@functools.cache
def _parallel() -> Any:
    function = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def run(address: int, packed: Any, threads: int) -> None:
    """Call the compiled loop at ``address`` with ``packed`` arguments on that many threads."""
    _parallel()(address, ctypes.addressof(packed), threads, 0)


def arguments(values: Sequence[torch.Tensor | int | float | None]) -> Any:
    """What a loop takes: tensors by their address, floats by their bits, None as zero."""
    return (ctypes.c_int64 * len(values))(*(as_int(value) for value in values))


class Kernel:
    """One compiled loop, found and compiled when it is first called.

    Args:
        operation: Folder of the kernel; its module ``loops`` holds the function.
        name: Of the function. Its argument is a pointer to int64 values, see ``__call__``; it must
            write only to its own share of the rows.
    """

    def __init__(self, operation: str, name: str):
        self.operation, self.name = operation, name

    @functools.cached_property
    def _address(self) -> int:
        from finegraft.kernels import _compile

        module = importlib.import_module(f"finegraft.kernels.{self.operation}.loops")
        return _compile.address(getattr(module, self.name))

    def __call__(self, elements: int, *values: torch.Tensor | int | float | None) -> None:
        """Run over all threads.

        Args:
            elements: Roughly how many numbers are touched; a few run on this thread alone.
            values: Tensors (their address), numbers (as they are), None (zero).
        """
        packed = arguments(values)
        threads = 1 if elements < _SERIAL_ELEMENTS else torch.get_num_threads()
        run(self._address, packed, threads)


def as_int(value: torch.Tensor | int | float | None) -> int:
    """What a loop is given for a value: a tensor's address, a float's bits, zero for None."""
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        bits: int = struct.unpack("q", struct.pack("d", value))[0]
        return bits
    return int(value)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [t, sum of widths] whose columns are ``parts``, without a copy where they lie so.

    Args:
        parts: [t, w_j] each; columns of one tensor, as ``Tensor.split`` gives, or any.
    """
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    if len(parts) == 1:
        return first
    at, dense = first.data_ptr(), first.stride(-1) == 1 and width <= first.stride(0)
    for part in parts:
        dense = dense and part.data_ptr() == at and part.stride() == first.stride()
        at += part.shape[-1] * part.element_size()
    if not dense:
        return torch.cat(list(parts), -1)
    return first.as_strided((first.shape[0], width), (first.stride(0), 1))
