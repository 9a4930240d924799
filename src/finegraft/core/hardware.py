"""What this computer is, as facts.

What: one frozen record of processor, memory and accelerators, read once per process and never at
import. How: torch's own probes for instruction sets and CUDA, psutil for memory and cores.
Constraint: no timing here, so the record is the same on every call; ``finegraft doctor`` measures.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hardware:
    """Facts about the machine. Memory is in bytes.

    Attributes:
        cpu: Processor name.
        cores: Physical cores that this process may use.
        memory_bytes: Total memory.
        cpu_bf16: The processor multiplies bfloat16 natively (AVX512-BF16, AMX or Arm BF16).
        gpus: Names of the CUDA devices, empty without one.
        gpu_bf16: The first CUDA device computes bfloat16 natively.
    """

    cpu: str
    cores: int
    memory_bytes: int
    cpu_bf16: bool
    gpus: tuple[str, ...]
    gpu_bf16: bool

    @property
    def device(self) -> str:
        """The device that models are put on by default."""
        return "cuda" if self.gpus else "cpu"

    @property
    def native_bf16(self) -> bool:
        """Whether bfloat16 is the faster precision on the default device."""
        return self.gpu_bf16 if self.gpus else self.cpu_bf16


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_bf16() -> bool:
    import torch

    if platform.machine() in ("arm64", "aarch64"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as lines:
                return any(" bf16" in line for line in lines)
        except OSError:
            return platform.system() == "Darwin"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


@functools.cache
def facts() -> Hardware:
    """Return the facts about this machine, read once per process."""
    import psutil
    import torch

    gpus: tuple[str, ...] = ()
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Hardware(
        cpu=_cpu_name(),
        cores=len(psutil.Process().cpu_affinity() or [0])
        if hasattr(psutil.Process, "cpu_affinity")
        else (psutil.cpu_count(logical=False) or 1),
        memory_bytes=psutil.virtual_memory().total,
        cpu_bf16=_cpu_bf16(),
        gpus=gpus,
        gpu_bf16=bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False),
    )


def default_dtype() -> torch.dtype:
    """Return the dtype for frozen weights: bfloat16 where it is native, else float32.

    Never float16 on a CPU: a 1,024 x 1,024 float16 product with its backward takes over a second
    there. On GPUs without bfloat16 (before Ampere) float16 is the native half precision.
    """
    import torch

    found = facts()
    if found.native_bf16:
        return torch.bfloat16
    return torch.float16 if found.gpus else torch.float32
