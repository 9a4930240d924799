"""Settings of the whole process, which a program may choose for itself and a library never does."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 20


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation instead of returning it.

    Page faults on large temporaries cost more than the arithmetic on them: 771 against 961 tokens
    a second in a LoRA step of a 135M model. The command line calls this for its own process.

    Returns:
        True where the C library is glibc and took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has no such call
        return False
    settings = (
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)


def give_back_memory() -> bool:
    """Let the C library return large blocks at once, which it otherwise keeps for a while.

    Split layers are put together and let go of all the time; after three steps of a 135M model the
    heap of such a process held 1.2 GB that nobody used.

    Returns:
        True where the C library is glibc and took the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES) == 1


@contextlib.contextmanager
def bounded_memory() -> Iterator[bool]:
    """Let allocations of this process fail where the machine's memory ends, for a block.

    The kernel would end the process there, and nothing could answer that; an exception makes
    training go on with smaller steps. The command line does this for its own process.

    Yields:
        Whether a bound is set; not with a GPU, whose drivers reserve address space at will.
    """
    import torch

    from finegraft.core import memory

    if torch.cuda.is_available():
        yield False
        return
    before = memory.bound()
    try:
        yield memory.bound_to(memory.available_bytes())
    finally:
        memory.set_bound(before)
