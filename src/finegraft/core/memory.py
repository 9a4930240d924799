"""How much memory there is for this process, and how much it has taken.

What: what may still be taken, the peak so far, and an optional bound. How: psutil, cut down to what
a control group (a container, a batch job) allows; the kernel's own high-water mark. Constraint:
nothing is set by asking. Trade-off: ``bound_to`` counts address space and not pages, so it stops a
little early, but as an exception that a program can answer: what the kernel does at the end of the
memory is a SIGKILL.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def available_bytes() -> int:
    """Memory that this process could still take before the machine or its group has none."""
    import psutil

    machine = int(psutil.virtual_memory().available)
    return max(0, min(machine, _group_bytes(_GROUPS), _bound_bytes()))


def _bound_bytes() -> int:
    """What a bound of this process leaves, see ``bound_to``."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return _UNLIMITED if soft < 0 or soft >= _UNLIMITED else soft - (_data_bytes() or 0)


def _data_bytes() -> int | None:
    """Private address space of this process; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmData")), None)


def _group_bytes(root: Path) -> int:
    """What the control group leaves, its caches counted as free; a large number without a limit."""
    for limit, used, cache, stat in (
        ("memory.max", "memory.current", "inactive_file", "memory.stat"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
            "memory/memory.stat",
        ),
    ):
        try:
            most = int((root / limit).read_text(encoding="ascii"))
            now = int((root / used).read_text(encoding="ascii"))
            lines = (root / stat).read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):  # not there, or the word "max"
            continue
        freeable = dict(line.split(maxsplit=1) for line in lines).get(cache, "0")
        return min(_UNLIMITED, most - now + int(freeable))
    return _UNLIMITED


def resident_bytes() -> int:
    """Memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that this process has held since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bound_to(count: int) -> bool:
    """Let an allocation fail once this process has taken ``count`` bytes more than it has now.

    A program may set this for its own process; a library does not.

    Returns:
        Whether the system has such a bound and it is set; a lower one stays as it is.
    """
    taken = _data_bytes()
    if taken is None:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    set_bound(min(taken + count, *(limit for limit in (soft, hard) if limit >= 0), _UNLIMITED))
    return True


def bound() -> int:
    """The bound of this process as the system has it; negative: none."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def set_bound(count: int) -> None:
    """Put the bound of this process to ``count`` bytes of address space; negative: none."""
    resource.setrlimit(resource.RLIMIT_DATA, (count, resource.getrlimit(resource.RLIMIT_DATA)[1]))
