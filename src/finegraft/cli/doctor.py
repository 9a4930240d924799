"""``finegraft doctor``: what this computer is, how fast, and what stands in the way.

What: a list of findings, each ok, a warning or broken, the last two with a cure. How: facts from
``core.hardware``, timed matrix products, installed versions against the ranges that finegraft
itself was installed with, and ``doctor_checks``. Constraint: under ten seconds, and never a secret
in the output. Trade-off: rates are lower bounds, see ``core.speed``.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from finegraft.cli import doctor_checks
from finegraft.cli.doctor_checks import Finding
from finegraft.cli.help import Help
from finegraft.cli.output import Output

MATMUL_SECONDS = 0.7  # for each precision
SLOW_BF16 = 0.8  # of the float32 rate; below it float32 is the better precision

_SIGNS = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "broken": "[red]broken[/red]"}


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
    """Processor and GPUs, and the precision that follows from them."""
    import torch

    from finegraft.core.hardware import default_dtype, facts

    found = facts()
    yield Finding("processor", "ok", f"{found.cpu}, {found.cores} cores, {_bf16(found.cpu_bf16)}")
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


def speed() -> tuple[list[Finding], dict[str, float], float]:
    """Measured rates of the precisions and of a copy in memory, on the default device."""
    import torch

    from finegraft.core.hardware import facts
    from finegraft.core.speed import gflops

    found = facts()
    rates = {
        name: gflops(getattr(torch, name), found.device, MATMUL_SECONDS)
        for name in ("float32", "bfloat16", "float16")
    }
    lines = [Finding("float32", "ok", f"{rates['float32']:,.0f} GFLOP/s")]
    words = f"{rates['bfloat16']:,.0f} GFLOP/s"
    slow = found.native_bf16 and rates["bfloat16"] < SLOW_BF16 * rates["float32"]
    cure = "train with --dtype float32" if slow else None
    lines.append(Finding("bfloat16", "warn" if slow else "ok", words, cure))
    words = f"{rates['float16']:,.0f} GFLOP/s"
    lines.append(Finding("float16", "ok", words if found.gpus else f"{words}; not for training"))
    copied = doctor_checks.copy_rate(found.device)
    lines.append(Finding("memory speed", "ok", f"{copied / 1e9:,.1f} GB/s copied"))
    return lines, rates, copied


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


def _checks() -> list[Callable[[], Iterator[Finding]]]:
    """What is looked at once torch is known to be there."""
    found = doctor_checks
    return [
        hardware,
        found.memory,
        found.threads,
        found.storage,
        found.engines,
        found.token,
        found.hub,
    ]


def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this computer and what is installed on it."""
    out: Output = ctx.obj
    findings = [*system(), *libraries()]
    rates: dict[str, float] = {}
    copied: float | None = None
    if not any(f.name in ("torch", "psutil") and f.status == "broken" for f in findings):
        with out.busy("measuring"):
            findings += [finding for check in _checks() for finding in check()]
            lines, rates, copied = speed()
        findings += lines
    broken = any(finding.status == "broken" for finding in findings)
    values = {
        "ok": not broken,
        "gflops": rates,
        "copy_bytes_per_second": copied,
        "findings": [asdict(finding) for finding in findings],
    }
    out.result(values, lambda to: _show(findings, to))
    if broken:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(doctor)
