"""Numbers into GGUF's blocks, several threads at a time.

What: ``encode`` turns rows into the bytes of one type; ``check`` says beforehand what is missing.
How: ``libgguf`` (llama.cpp's own row functions, prebuilt) where it is installed, else the ``gguf``
package's numpy code, which is byte-equal and knows no K-quants. Constraint: a block belongs to one
row, so slices of rows are independent and any number of threads gives the same bytes. Trade-off:
none of them takes an importance matrix.

libgguf lets go of Python's lock while it works: another thread never waited longer than 17 ms
during 1.2 s of Q4_K. One thread makes about 8 million weights a second of Q4_K, 140 of Q8_0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from finegraft.core.errors import ExportError

# Numbers in one piece of work: 16 MB as float32, large beside the call, small beside a model.
_PIECE = 4_000_000


@functools.cache
def _library() -> Any:
    """The libgguf module, or None where it is not installed."""
    if importlib.util.find_spec("libgguf") is None:
        return None
    return importlib.import_module("libgguf")


def is_possible(kind: Type) -> bool:
    """Whether this installation can write ``kind``."""
    plain = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)
    return kind in plain or _library() is not None


def check(kinds: dict[str, Type], name: str) -> None:
    """Prove that every type in ``kinds`` can be written.

    Args:
        kinds: Types by tensor.
        name: Of the file type that asked for them.

    Raises:
        ExportError: FG-EXPORT-002, a K-quant without libgguf.
    """
    missing = sorted({kind.name for kind in kinds.values() if not is_possible(kind)})
    if missing:
        raise ExportError(
            "FG-EXPORT-002",
            f"'{name}' has tensors in {', '.join(missing)}, which neither the gguf package nor "
            "libgguf can write here: libgguf is not installed",
            allowed="without libgguf: f32, f16, bf16, q8_0",
            fix='pip install "finegraft[gguf]"; or write f16 and run llama.cpp\'s llama-quantize',
        )


def threads(count: int | None) -> int:
    """``count``, or as many as this process may run on."""
    if count:
        return count
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode(rows: np.ndarray, kind: Type) -> np.ndarray:
    """Return the bytes of float32 ``rows`` [n, length] in ``kind``."""
    library = _library()
    quantized = kind not in (Type.F32, Type.F16, Type.BF16)
    if library is not None and quantized:
        found: np.ndarray = library.quantize_rows(rows, int(kind))
    else:
        found = gguf.quants.quantize(rows, kind)
    return np.ascontiguousarray(found).view(np.uint8)


def pieces(
    tensor: torch.Tensor, kind: Type, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[np.ndarray]:
    """Yield the bytes of ``tensor`` in ``kind``, in order.

    Args:
        tensor: [rows, length] or [length], any float dtype.
        ahead: Pieces that are worked on before the first is taken.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _PIECE // flat.shape[1])

    def work(start: int) -> np.ndarray:
        return encode(flat[start : start + step].float().contiguous().numpy(), kind)

    waiting = deque()
    for start in range(0, flat.shape[0], step):
        waiting.append(pool.submit(work, start))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
