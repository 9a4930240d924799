"""Machine facts, and a result as table, picture, JSON and README section."""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Products of SmolLM2-135M.
SHAPES = ((1024, 576, 1536), (2048, 576, 1536), (2048, 576, 3072))
LABELS = {
    "trl-float32": "trl + peft, float32, padded",
    "trl-bf16": "trl + peft, bf16 weights, padded",
    "peft-bare-bf16": "peft in a bare loop, bf16, no trainer",
    "trl-4bit": "trl + peft + bitsandbytes, NF4 base, bf16 compute",
    "finegraft-4bit": "finegraft, NF4 base, every token computed",
    "finegraft": "finegraft, every token computed",
    "finegraft-shared": "finegraft, the shared system prompt once a batch (the default)",
}


def machine(threads: int) -> dict[str, Any]:
    """What ran it, without names that identify a host."""
    from finegraft.core.hardware import facts

    found = facts()
    return {
        "cpu": found.cpu,
        "threads": threads,
        "native_bf16": found.cpu_bf16,
        "memory_gb": round(found.memory_bytes / 2**30),
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """The libraries that matter for speed."""
    names = ("torch", "transformers", "peft", "trl", "accelerate", "finegraft")
    return {name: version(name) for name in names}


def product_rate(threads: int, shapes: Iterable[tuple[int, int, int]] = SHAPES) -> float:
    """Best bf16 product rate of this machine in flop/s, over (rows, inner width, columns)."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for rows, width, out in shapes:
        a, b = torch.randn(rows, width).bfloat16(), torch.randn(out, width).bfloat16()
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            for _ in range(10):
                torch.nn.functional.linear(a, b)
            seconds.append((time.perf_counter() - started) / 10)
        best = max(best, 2 * rows * width * out / statistics.median(sorted(seconds)[:6]))
    return best


def write(
    result: dict[str, Any], path: Path, in_words: Callable[[dict], str] | None = None
) -> None:
    """Write JSON and PNG, and print the table (``in_words``, or the one of training runs)."""
    result["command"] = command()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture(result, path.with_suffix(".png"))
    print((in_words or table)(result))
    print(f"wrote {path}", file=sys.stderr)


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    best = next(row for row in result["rows"] if row["contender"] == "finegraft")
    lines = [
        "| contender | tokens/s | rows/s | peak memory | held-out loss | finegraft is |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ours = row["contender"].startswith("finegraft")
        ratio = best["tokens_per_second"] / row["tokens_per_second"]
        times = "" if ours else f"{ratio:.1f}x as fast"
        lines.append(
            f"| {LABELS.get(row['contender'], row['contender'])} "
            f"| {row['tokens_per_second']:.0f} | {row['rows_per_second']:.1f} "
            f"| {row['peak_memory_bytes'] / 1e9:.1f} GB | {row['heldout_loss']:.3f} "
            f"| {times} |"
        )
    lines += [
        "",
        f"{result['task']}; {where(result)}; median of alternating steps in one run. finegraft's "
        f"matrix products alone are {result['roofline_fraction']:.0%} of what this machine does.",
    ]
    return "\n".join(lines)


def command() -> str:
    """How this was run, from the repository's root."""
    given = [a for a in sys.argv[1:] if a != "--output"]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])


def where(result: dict[str, Any]) -> str:
    """The machine, the day and the versions of a result."""
    facts, versions = result["machine"], result["versions"]
    return (
        f"{facts['threads']} threads of {facts['cpu']}"
        f"{', native bf16' if facts['native_bf16'] else ''}, {facts['date']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, trl {versions['trl']}"
    )


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    names = [LABELS.get(row["contender"], row["contender"]) for row in result["rows"]]
    values = [row["tokens_per_second"] for row in result["rows"]]
    colours = ["C1" if "finegraft" in name else "C0" for name in names]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("real tokens a second")
    figure.savefig(path, dpi=120)
