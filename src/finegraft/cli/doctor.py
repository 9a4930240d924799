"""``finegraft doctor``: what this computer is, how fast, and what stands in the way.

What: a list of findings, each ok, a warning or broken, the last two with a cure. How: facts from
``core.hardware``, two timed matrix products, installed versions against the ranges that finegraft
itself was installed with. Constraint: two seconds of measuring, no network, and never a secret in
the output. Trade-off: products of 1,024 columns are smaller than a large model's, so the rate is a
lower bound.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from finegraft.cli.help import Help
from finegraft.cli.output import Output
from finegraft.cli.progress import size
from finegraft.core.paths import cache_dir

MATMUL_SIZE = 1024
MATMUL_SECONDS = 0.7
LOW_MEMORY_BYTES = 2e9
LOW_DISK_BYTES = 5e9
SLOW_BF16 = 0.8  # of the float32 rate; below it float32 is the better precision

Status = Literal["ok", "warn", "broken"]
_SIGNS = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "broken": "[red]broken[/red]"}


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


def _requirements() -> list[Any]:
    """finegraft's own requirements, extras aside; None of them where it is not installed."""
    from packaging.requirements import Requirement

    listed = metadata.requires("finegraft") or []
    found = [Requirement(text) for text in listed]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def libraries() -> Iterator[Finding]:
    """Each required library against the range that finegraft is tested with."""
    try:
        wanted = _requirements()
    except metadata.PackageNotFoundError:
        yield Finding("finegraft", "warn", "not installed as a package", "pip install -e .")
        return
    for requirement in wanted:
        name, allowed = requirement.name, str(requirement.specifier)
        install = f"pip install '{name}{allowed}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "broken", f"missing, needs {allowed}", install)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, "ok", f"{version} (within {allowed})")
        else:
            yield Finding(name, "warn", f"{version} (outside {allowed})", install)


def system() -> Iterator[Finding]:
    """Python and the operating system."""
    version = platform.python_version()
    new = sys.version_info >= (3, 11)
    cure = None if new else "use Python 3.11 or newer"
    yield Finding("python", "ok" if new else "broken", version, cure)
    yield Finding("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")


def hardware() -> Iterator[Finding]:
    """Processor, memory and GPUs, and the precision that follows from them."""
    import psutil
    import torch

    from finegraft.core.hardware import default_dtype, facts

    found = facts()
    yield Finding("processor", "ok", f"{found.cpu}, {found.cores} cores, {_bf16(found.cpu_bf16)}")
    free = psutil.virtual_memory().available
    low = free < LOW_MEMORY_BYTES
    cure = "close other programs, or use a smaller model or batch" if low else None
    words = f"{size(free)} free of {size(found.memory_bytes)}"
    yield Finding("memory", "warn" if low else "ok", words, cure)
    seen = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
    if found.gpus:
        yield Finding("gpu", "ok", f"{', '.join(found.gpus)}, {_bf16(found.gpu_bf16)}")
    elif seen and torch.version.cuda is None:
        cure = "pip install --force-reinstall torch (the default wheel), or see pytorch.org"
        yield Finding("gpu", "warn", "an NVIDIA GPU, but torch is built for the CPU only", cure)
    elif seen:
        cure = "look at `nvidia-smi`; an older driver needs a torch for an older CUDA"
        yield Finding("gpu", "warn", "an NVIDIA driver, but torch finds no device", cure)
    else:
        yield Finding("gpu", "ok", "none; training runs on the processor")
    yield Finding("default dtype", "ok", str(default_dtype()).removeprefix("torch."))


def _bf16(native: bool) -> str:
    return "native bfloat16" if native else "no native bfloat16"


def gflops(dtype: Any, device: str) -> float:
    """Best measured rate of a square product, in GFLOP/s."""
    import torch

    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best / 1e9


def speed() -> tuple[list[Finding], dict[str, float]]:
    """Measured float32 and bfloat16 rates on the default device."""
    import torch

    from finegraft.core.hardware import facts

    found = facts()
    rates = {
        "float32": gflops(torch.float32, found.device),
        "bfloat16": gflops(torch.bfloat16, found.device),
    }
    lines = [Finding("float32", "ok", f"{rates['float32']:,.0f} GFLOP/s")]
    words = f"{rates['bfloat16']:,.0f} GFLOP/s"
    slow = found.native_bf16 and rates["bfloat16"] < SLOW_BF16 * rates["float32"]
    cure = "train with --dtype float32" if slow else None
    lines.append(Finding("bfloat16", "warn" if slow else "ok", words, cure))
    return lines, rates


def storage() -> Iterator[Finding]:
    """The cache folder and the room on its disk."""
    folder = cache_dir()
    anchor = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(anchor).free
    low = free < LOW_DISK_BYTES
    cure = "free some space, or set XDG_CACHE_HOME to a folder on another disk" if low else None
    yield Finding("cache", "warn" if low else "ok", f"{folder} ({size(free)} free)", cure)


def token() -> Iterator[Finding]:
    """Whether there is a token for the hub; never the token."""
    from huggingface_hub import get_token

    words = "present" if get_token() else "none; only gated and private models need one"
    yield Finding("hub token", "ok", words)


def _show(findings: list[Finding], to: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        words = finding.value + (f"\n-> {finding.cure}" if finding.cure else "")
        table.add_row(_SIGNS[finding.status], finding.name, words)
    to.print(table)
    wrong = [f.name for f in findings if f.status != "ok"]
    to.print(f"\nLook at: {', '.join(wrong)}" if wrong else "\nEverything is in order.")


def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this computer and what is installed on it."""
    out: Output = ctx.obj
    findings = [*system(), *libraries()]
    rates: dict[str, float] = {}
    checks: list[Callable[[], Any]] = [hardware, storage, token]
    if not any(f.name in ("torch", "psutil") and f.status == "broken" for f in findings):
        with out.busy("measuring"):
            findings += [finding for check in checks for finding in check()]
            lines, rates = speed()
        findings += lines
    broken = any(finding.status == "broken" for finding in findings)
    values = {
        "ok": not broken,
        "gflops": rates,
        "findings": [asdict(finding) for finding in findings],
    }
    out.result(values, lambda to: _show(findings, to))
    if broken:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(doctor)
