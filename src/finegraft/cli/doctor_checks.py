"""What ``finegraft doctor`` looks at beyond versions and processor: memory, threads, disks, hub.

What: functions that yield findings. How: facts of the operating system and of the libraries that
are asked; one request to the hub, in a thread that is not waited for longer than three seconds.
Constraint: no token is ever in a finding, and a machine without a network has nothing wrong with
it. Trade-off: sizes of caches are counted file by file, a second for a million files.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from finegraft.cli.progress import size
from finegraft.core.paths import cache_dir

LOW_MEMORY_BYTES = 2e9
LOW_DISK_BYTES = 5e9
HUB_SECONDS = 3.0
COPY_BYTES, COPY_SECONDS = 64 << 20, 0.5
GROUPS = Path("/sys/fs/cgroup")

Status = Literal["ok", "warn", "broken"]

# What the extras of pyproject.toml are for.
_EXTRAS = {
    "serve": "finegraft serve",
    "gguf": "GGUF K-quants (q4_k_m ...)",
    "eval": "chrF, BLEU and ROUGE in finegraft eval",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: ok, warn or broken.
        value: What was found.
        cure: What to do about it, where something is wrong.
    """

    name: str
    status: Status
    value: str
    cure: str | None = None


def _group_file(name: str, old: str) -> int | None:
    """The least number in a file of this process's control group and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    own = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "/")
    folder = GROUPS / own.strip("/")
    places = [place / name for place in (folder, *folder.parents) if place.is_relative_to(GROUPS)]
    found = []
    for path in (*places, GROUPS / old):
        try:
            found.append(int(path.read_text(encoding="ascii").split()[0]))
        except (OSError, ValueError, IndexError):  # not there, or the word "max"
            continue
    return min(found, default=None)


def memory() -> Iterator[Finding]:
    """Free and total memory, and what a container or batch job allows of it."""
    import psutil

    from finegraft.core.memory import available_bytes

    total = psutil.virtual_memory().total
    limit = _group_file("memory.max", "memory/memory.limit_in_bytes")
    free = available_bytes()
    low = free < LOW_MEMORY_BYTES
    cure = "close other programs, or use a smaller model or batch" if low else None
    yield Finding("memory", "warn" if low else "ok", f"{size(free)} free of {size(total)}", cure)
    if limit is not None and limit < total:
        words = f"{size(limit)} of the machine's {size(total)} (a container's or batch job's limit)"
        yield Finding("memory limit", "ok", words)


def threads() -> Iterator[Finding]:
    """Threads of torch against the cores and the processor time that this process may use."""
    import torch

    from finegraft.core.hardware import facts

    count, cores = torch.get_num_threads(), facts().cores
    asked = os.environ.get("OMP_NUM_THREADS")
    words = f"{count} of {cores} cores" + (f" (OMP_NUM_THREADS={asked})" if asked else "")
    share = _processor_share()
    if share is not None and share < count:
        cure = f"OMP_NUM_THREADS={max(1, round(share))}: more threads only wait for one another"
        yield Finding("threads", "warn", f"{words}, and time for {share:g} processors", cure)
    elif asked and count < cores:
        yield Finding("threads", "warn", words, "unset OMP_NUM_THREADS, to use all cores")
    elif count > cores:
        yield Finding("threads", "warn", words, f"OMP_NUM_THREADS={cores}")
    else:
        yield Finding("threads", "ok", words)


def _processor_share() -> float | None:
    """Processors' worth of time that the control group allows; None without a limit."""
    try:
        quota, period = (GROUPS / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def copy_rate(device: str) -> float:
    """Best measured rate of a copy in memory, in bytes written a second."""
    import torch

    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best, end = float("inf"), time.perf_counter() + COPY_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return COPY_BYTES / best


def _bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total


def _size_of(folder: Path) -> str:
    total = _bytes_in(folder)
    return f"{size(total)} in it" if total else "empty"


def _disk(name: str, folder: Path, words: str, cure: str) -> Finding:
    anchor = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(anchor).free
    low = free < LOW_DISK_BYTES
    return Finding(
        name, "warn" if low else "ok", f"{words}{size(free)} free", cure if low else None
    )


def storage() -> Iterator[Finding]:
    """Caches with their sizes, and the room on their disks and on this one."""
    from huggingface_hub import constants

    own, hub = cache_dir(), Path(constants.HF_HUB_CACHE)
    yield _disk(
        "cache",
        own,
        f"{own}, {_size_of(own)}, ",
        "free some space, or set XDG_CACHE_HOME to a folder on another disk",
    )
    yield _disk(
        "hub cache",
        hub,
        f"{hub}, {_size_of(hub)}, ",
        "free some space (`hf cache`), or set HF_HOME to a folder on another disk",
    )
    here = Path.cwd()
    yield _disk("disk", here, f"{here}, ", "free some space, or --output on another disk")


def token() -> Iterator[Finding]:
    """Whether there is a token for the hub; never the token."""
    from huggingface_hub import get_token

    words = "present" if get_token() else "none; only gated and private models need one"
    yield Finding("hub token", "ok", words)


def hub() -> Iterator[Finding]:
    """Whether the hub, or the mirror that HF_ENDPOINT names, answers."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", "not asked, because HF_HUB_OFFLINE is set")
        return
    answer: list[str | None] = []
    asking = threading.Thread(target=lambda: answer.append(_asked(endpoint)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)  # looking up a name has no timeout of its own
    problem = answer[0] if answer else f"no answer in {HUB_SECONDS:g} s"
    if problem is None:
        yield Finding("hub", "ok", f"{endpoint} answers")
    elif os.environ.get("HF_ENDPOINT"):
        cure = "correct HF_ENDPOINT, or unset it"
        yield Finding("hub", "warn", f"{endpoint} (HF_ENDPOINT) is not reachable: {problem}", cure)
    else:
        words = f"{endpoint} is not reachable ({problem}); demo and local models need no hub"
        yield Finding("hub", "ok", words)


def _asked(endpoint: str) -> str | None:
    """Ask for the front page; None when anything answers, else why not."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    http_error = errors.HfHubHTTPError.__bases__[0]  # of the HTTP client that is in use
    try:
        get_session().head(endpoint, timeout=HUB_SECONDS)
    except (http_error, OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def engines() -> Iterator[Finding]:
    """Libraries of the extras that people use, and vLLM's interpreter."""
    for extra, requirement in _extras():
        name, allowed = requirement.name, str(requirement.specifier)
        install = f"pip install 'finegraft[{extra}]'"
        use = _EXTRAS[extra]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "ok", f"not installed; for {use}: {install}")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, "ok", f"{version} (within {allowed}; for {use})")
        else:
            yield Finding(name, "warn", f"{version} (outside {allowed}; for {use})", install)
    command = shutil.which("vllm")
    if util.find_spec("vllm") is not None:
        words = "in this environment, whose versions it may not share with finegraft"
        yield Finding("vllm", "warn", words, "install it in an environment of its own")
    elif command:
        python = Path(command).resolve().with_name("python")
        yield Finding("vllm", "ok", f"{command}; finegraft serve --vllm-python {python}")
    else:
        yield Finding("vllm", "ok", "not found; --vllm-python names its interpreter")


def _extras() -> Iterator[tuple[str, Any]]:
    """Requirements of each extra of ``_EXTRAS`` that this system needs."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(text) for text in metadata.requires("finegraft") or []]
    except metadata.PackageNotFoundError:
        return
    for extra in _EXTRAS:
        for requirement in listed:
            marker = requirement.marker
            wanted = marker is not None and marker.evaluate({"extra": extra})
            if wanted and not marker.evaluate({"extra": ""}):
                yield extra, requirement
