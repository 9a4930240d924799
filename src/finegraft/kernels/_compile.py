"""What numba needs to know for the loops of ``_loops``; imported on first use.

What: bfloat16 as 16-bit integers, exp as a polynomial, and the wrapper that gives a loop its
thread. Constraint: LLVM vectorises these helpers because they are branchless; ``math.exp`` would be
a call per element. Trade-off: exp is good to 1e-7, enough for results rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

# Sums may be taken in another order and products fused into sums; nan and infinity stay.
FAST = {"reassoc", "contract", "nsz"}

_SIGNATURE = types.void(types.CPointer(types.int64))
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def _bitcast(source: Any, target: Any, llvm: Any) -> Any:
    @intrinsic
    def cast(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], llvm)

        return target(source), generate

    return cast


def _pointer(element: Any, bits: Any) -> Any:
    @intrinsic
    def point(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], bits.as_pointer())

        return types.CPointer(element)(types.int64), generate

    return point


float_of = _bitcast(types.uint32, types.float32, ir.FloatType())
bits_of = _bitcast(types.float32, types.uint32, ir.IntType(32))
_double_of = _bitcast(types.int64, types.float64, ir.DoubleType())
_half_pointer = _pointer(types.uint16, ir.IntType(16))
_single_pointer = _pointer(types.float32, ir.FloatType())
_integer_pointer = _pointer(types.int64, ir.IntType(64))
_octet_pointer = _pointer(types.uint8, ir.IntType(8))


@njit(inline="always")
def wide(half):
    """Bfloat16 bits to float32."""
    return float_of(np.uint32(half) << np.uint32(16))


@njit(inline="always")
def narrow(single):
    """float32 to bfloat16 bits, to the nearest, ties to even; the processor's nan stays nan."""
    bits = bits_of(single)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@njit(inline="always")
def real(bits):
    """The float that was passed as an argument."""
    return np.float32(_double_of(bits))


@njit(inline="always")
def exp(x):
    """e**x for float32, relative error 1e-7; saturates at e**-87 and e**88."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = float_of(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return (p * r * r + r + np.float32(1.0)) * power


@njit(inline="always")
def tanh(x):
    """Hyperbolic tangent for float32, absolute error 1e-7."""
    return np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * x) + np.float32(1.0))


@njit(inline="always")
def halves(address, size):
    """[size] bfloat16 bits at an address."""
    return carray(_half_pointer(address), (size,))


@njit(inline="always")
def singles(address, size):
    """[size] float32 at an address."""
    return carray(_single_pointer(address), (size,))


@njit(inline="always")
def integers(address, size):
    """[size] int64 at an address."""
    return carray(_integer_pointer(address), (size,))


@njit(inline="always")
def octets(address, size):
    """[size] bytes at an address."""
    return carray(_octet_pointer(address), (size,))


@njit(inline="always")
def share(rows, thread, threads):
    """First row and end of a thread's part."""
    return rows * thread // threads, rows * (thread + 1) // threads


@njit(inline="always")
def thread():
    """Number of this thread and how many there are in the parallel region."""
    return np.int64(_thread()), np.int64(_threads())


def address(body: Callable[[Any], None]) -> int:
    """Compile a loop of one argument, a pointer to int64 arguments, and return where it is."""
    options = {"fastmath": FAST, "error_model": "numpy"}
    try:
        compiled = cfunc(_SIGNATURE, cache=True, **options)(body)
    except OSError:  # nowhere to keep it: a full disk, say
        compiled = cfunc(_SIGNATURE, **options)(body)
    found: int = compiled.address
    return found
