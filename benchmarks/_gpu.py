"""What both GPU benchmarks share: shapes of the models, clocks, probes, and writing a result.

What: configuration constants of three models, so that nothing is fetched; timing with CUDA events;
the rates of copies and matrix products of the same device in the same run. Constraint: every timed
call follows a write of a large buffer, which empties the L2 cache and lets the host run ahead, so
that a short kernel is not timed with its launch. On a CPU (``--dry-run``) the same code runs with
the host's clock, and its numbers mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
sys.path.insert(0, str(SOURCE))  # runs from the repository, installed or not

SEED = 11

# 1 GiB takes 0.4 ms to write on an H100: more than the host needs to launch one forward and
# backward, and more than any L2 cache holds.
_FLUSH_BYTES = 1 << 30
_WARM_UPS = 3

_LIBRARIES = (
    *("torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes"),
    *("liger-kernel", "unsloth", "flash-attn", "xformers"),
)

# Dense bf16 rates in flop/s from the vendor's data sheets, by the device's exact name.
DATA_SHEET = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, as its published configuration has them."""

    name: str
    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    features: int
    rope_theta: float
    eps: float
    tied: bool = False

    def config(self) -> Any:
        """The transformers configuration; positions for 8k tokens, no sliding window."""
        from transformers import AutoConfig

        fields = {"head_dim": self.features} if self.model_type != "phi3" else {}
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            rms_norm_eps=self.eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **fields,
        )

    @property
    def frozen_products(self) -> int:
        """Weights of all linear layers, the head included."""
        attention = self.hidden * self.features * (2 * self.heads + 2 * self.key_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.hidden * self.vocabulary

    def adapter_weights(self, r: int) -> int:
        """LoRA weights of rank ``r`` on all linear layers but the head, as the family has them."""
        d, i, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.features,
            self.key_heads * self.features,
        )
        if self.model_type == "phi3":  # fused projections
            sums = (d + q + 2 * kv) + (q + d) + (d + 2 * i) + (i + d)
        else:
            sums = (d + q) + 2 * (d + kv) + (q + d) + 2 * (d + i) + (i + d)
        return self.layers * r * sums

    def tiny(self) -> Shape:
        """Small enough for a CPU, all ratios still uneven."""
        heads = min(self.heads, 4)
        return replace(
            self,
            vocabulary=1024,
            hidden=heads * 16,
            intermediate=112,
            layers=2,
            heads=heads,
            key_heads=heads * self.key_heads // self.heads,
            features=16,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", "llama", 128256, 4096, 14336, 32, 32, 8, 128, 500000.0, 1e-5),
        Shape("phi-3-mini", "phi3", 32064, 3072, 8192, 32, 32, 32, 96, 10000.0, 1e-5),
        Shape("qwen3-4b", "qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 1000000.0, 1e-6, True),
    )
}


def document_lengths(tokens: int, seed: int = SEED) -> list[int]:
    """Lengths that sum to ``tokens``: from 64 tokens to half of all, short ones more often."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        share = float(torch.rand((), generator=generator))
        length = round(min(64, tokens) * (max(tokens // 2, 64) / 64) ** share)
        lengths.append(min(length, tokens - sum(lengths)))
    return lengths


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        size = _FLUSH_BYTES if device.type == "cuda" else 0
        self.buffer = torch.empty(size, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """One timed call; ready when this returns."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize(self.device)
        del result  # freed only now: nothing of it is reused while it is timed
        return begin.elapsed_time(end) / 1e3

    def alternate(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Median seconds of each call, all of them taking turns."""
        for call in calls.values():
            for _ in range(_WARM_UPS if self.device.type == "cuda" else 1):
                call()
        self.synchronize()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                taken[name].append(self.seconds(calls[name]))
        return {name: statistics.median(times) for name, times in taken.items()}

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most memory that one call had at once, its result included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        self.synchronize()
        del result
        return torch.cuda.max_memory_allocated(self.device) - before


def product_rate(device: torch.device) -> float:
    """Best rate of a large bf16 matrix product on this device, in flop/s."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(device)
    return 2 * n**3 / clock.alternate({"product": lambda: a @ b}, 9)["product"]


def copy_rate(device: torch.device) -> float:
    """Rate of a copy of 1 GiB on this device, read and written bytes a second."""
    size = 1 << 30 if device.type == "cuda" else 1 << 22
    a = torch.zeros(size, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * size / Clock(device).alternate({"copy": lambda: b.copy_(a)}, 9)["copy"]


def machine(device: torch.device) -> dict[str, Any]:
    """What ran it, without names that identify a host."""
    import _report

    found = _report.machine(torch.get_num_threads())
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": facts.name,
            "gpu_memory_gb": round(facts.total_memory / 2**30),
            "compute_capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def versions() -> dict[str, str]:
    """The libraries that matter for speed, those that are there."""
    import finegraft

    found = {"finegraft": finegraft.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(
    result: dict[str, Any], path: Path, table: str, bars: dict[str, float], label: str
) -> None:
    """Write JSON and PNG, and print the table.

    Args:
        bars: A number for each bar of the picture, by its name.
        label: What the numbers are, with the unit.
    """
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["C1" if "finegraft" in name else "C0" for name in bars]
    drawn = axes.barh(list(bars), list(bars.values()), color=colours)
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(table)
    print(f"wrote {path}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """An error in one line, for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"
