"""What the Triton kernels share before they launch: who may call them, views, tile sizes.

How: plain arithmetic on shapes; nothing here imports triton, so that a machine without it can ask
why a kernel refuses. Constraint: kernels take float32, bfloat16 and float16 on CUDA, and the same
on the CPU when Triton interprets; they compute in float32. Trade-off: tile sizes come from the
width alone and are not tuned on the machine, which costs no time at the first call and keeps every
sum in one order, run after run; they were chosen by arithmetic and from the compiler's register
counts, not by timing.

Shapes: n rows, d width of a row.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch

from finegraft.core.errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Products and sums may fuse: one rounding less. Said at every launch, because Triton 3.9 warns
# where it is left open and 3.10 changes what that means.
COMPILER = {"enable_fp_fusion": True}

# A row is one program. Up to 16,384 columns all of it stays in registers on compute capability 9.0;
# at 32,768 the backward spills 328 bytes a thread, beyond that thousands.
MAX_ROW = 1 << 15

# 16 elements a thread, two vector loads of 16 bytes in 16-bit dtypes: enough in flight to reach the
# memory's rate, few enough registers for several programs on one multiprocessor.
_ELEMENTS_PER_WARP = 512
# Below this a program is too short for its launch; narrow rows (the heads of a q/k norm) share one.
_MIN_TILE = 2048
# Programs a multiprocessor when each sums many rows: two of 8 warps at some 100 registers a thread
# (4,096 columns) are what fits on H100 and A100, and the partial sums stay few.
_PROGRAMS_PER_PROCESSOR = 2
# The interpreter has no multiprocessors; a few programs make it take the loops of the kernels.
_INTERPRETED_PROCESSORS = 2


class Tile(NamedTuple):
    """Rows and columns of one program, both powers of two, and its warps."""

    rows: int
    columns: int
    warps: int


def interpreting() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Return why the Triton kernels cannot take ``tensors``, None if they can."""
    device = tensors[0].device
    for x in tensors:
        if x.device != device:
            return f"tensors on {device} and on {x.device}"
        if x.is_floating_point() and x.dtype not in DTYPES:
            return f"Triton kernels compute in float32, the input is {x.dtype}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"Triton kernels run on CUDA, the input is on {device.type}"
    if not _has_triton():
        return "triton is not installed"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernel(op: str, *tensors: torch.Tensor) -> Any:
    """The Triton function of ``op`` for tensors on a GPU, None where the CPU's path must run.

    Tensors on a CPU never take it, also when Triton interprets: that is for tests.
    """
    if not tensors[0].is_cuda or unsupported(*tensors) is not None:
        return None
    return getattr(importlib.import_module(f"finegraft.kernels.{op}.triton"), op)


def require(op: str, *tensors: torch.Tensor) -> None:
    """Raise unless the Triton kernel of ``op`` can take ``tensors``.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that it cannot take.
    """
    reason = unsupported(*tensors)
    if reason is not None:
        raise ConfigError(
            "FG-KERNEL-001",
            f"{op}: {reason}",
            allowed="float32, bfloat16 or float16 on one CUDA device, with triton installed",
            fix=f"move or cast the tensors, or call finegraft.kernels.{op} without .triton",
        )


def require_shape(op: str, right: bool, found: str, allowed: str) -> None:
    """Raise unless ``right``: kernels read by address, and a wrong shape would read elsewhere.

    Raises:
        ConfigError: FG-KERNEL-002, shapes that do not belong together.
    """
    if not right:
        raise ConfigError(
            "FG-KERNEL-002", f"{op}: {found}", allowed=allowed, fix="pass tensors of these shapes"
        )


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [..., d] as [n, d] with its last dimension dense; a copy only if it must be."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for none)."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Warps for a program that holds this many elements at once, 1 to 16."""
    return min(max(power_of_2(elements // _ELEMENTS_PER_WARP), 1), 16)


def whole_rows(width: int) -> Tile:
    """Tile of a kernel that needs each row as a whole, such as a norm."""
    columns = power_of_2(width)
    count = max(_MIN_TILE // columns, 1)
    return Tile(count, columns, warps(count * columns))


def summing_programs(device: torch.device, tiles: int) -> int:
    """Programs for a kernel that sums over rows: each keeps one partial sum for its share."""
    processors = _INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(min(tiles, processors * _PROGRAMS_PER_PROCESSOR), 1)


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
