"""Tiles of the Triton kernels of document attention: how large, and which document each lies in.

What: a tile is some rows of one document; a table made on the host names the document of each.
How: the largest tile whose operands fit the device's shared memory and whose sums fit the
registers. Constraint: nothing here imports triton. Trade-off: chosen by arithmetic, not tuned on
the device: no search at the first call, and sums in the same order on every run.

Shapes: f features as a power of two, r rows of the tile that a program owns, s rows of the tiles
that it reads in turn.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """r, s, warps, and how many tiles of s rows are in flight."""

    owned: int
    read: int
    warps: int
    stages: int


# The interpreter has no shared memory; small tiles take short documents across many borders.
INTERPRETED = Tile(32, 16, 4, 1)
# Owned and read rows and stages, tried in this order; the first that fits is taken. Backward reads
# 32 rows at a time: at 128 features the compiler then spills at most 24 bytes of registers for
# compute capability 8.0 and none for 9.0; with 64 rows it spills 68 to 232.
_FORWARD = ((128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 32, 2), (32, 32, 2), (16, 16, 1))
_BACKWARD = ((128, 32, 3), (128, 32, 2), (64, 32, 2), (32, 32, 2), (32, 16, 1), (16, 16, 1))
_SHARED_MEMORY_SLACK = 4096  # bytes for log-sum-exps and alignment


def choose(
    filled: int, itemsize: int, sums: int, own: int, shared_memory: int, tensor_cores: bool = True
) -> Tile:
    """Return the tile of a kernel that fits the registers and the shared memory.

    Args:
        filled: f as a power of two.
        itemsize: Bytes of an element.
        sums: Float32 [r, f] sums that a program keeps in registers.
        own: [r, f] operands that a program keeps in shared memory, besides two [s, f] a stage; one
            in forward, two in backward.
        shared_memory: Bytes that one program may have.
        tensor_cores: Whether the compiler has them for this dtype. Without, products are unrolled,
            and large tiles spill registers and compile for minutes.
    """
    most = 16_384 if tensor_cores else 2_048  # 16,384 sums are 64 registers a thread of 8 warps
    for owned, read, stages in _FORWARD if own == 1 else _BACKWARD:
        shared = (own * owned * filled + 2 * stages * read * filled + owned * read) * itemsize
        if sums * owned * filled <= most and shared + _SHARED_MEMORY_SLACK <= shared_memory:
            break
    return Tile(owned, read, 8 if sums * owned * filled > 8192 or owned == 128 else 4, stages)


@functools.cache
def tile(device: torch.device, filled: int, itemsize: int, sums: int, own: int) -> Tile:
    """``choose`` for a device; small tiles for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    static = properties.shared_memory_per_block  # what builds for AMD report
    shared = getattr(properties, "shared_memory_per_block_optin", static)
    tensor_cores = itemsize == 2 and properties.major >= 8  # Triton has none for Turing
    return choose(filled, itemsize, sums, own, shared, tensor_cores)


@functools.lru_cache(maxsize=16)  # every layer of a batch asks for the same two or three
def table(
    lengths: tuple[int, ...], rows: int, late_first: bool, shared: bool, device: torch.device
) -> torch.Tensor:
    """Document start, document end and first row of every tile [tiles, 3], the heaviest first.

    Args:
        lengths: Of the documents, in tokens.
        rows: r.
        late_first: The tiles are of queries, not of keys.
        shared: All other documents see the first, whose keys are then the heaviest.
        device: Where the table is read.

    Query tiles are heavier the later they lie in their document, key tiles the earlier.
    """
    tiles, start = [], 0
    for length in lengths:
        end = start + length
        tiles += [(start, end, first) for first in range(start, end, rows)]
        start = end

    def weight(tile: tuple[int, int, int]) -> int:
        first_document = shared and tile[0] == 0
        return tile[2] - tile[0] if late_first else tile[1] - tile[2] + first_document * start

    tiles.sort(key=weight, reverse=True)  # a heavy tile that starts last would run alone
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).to(device)
