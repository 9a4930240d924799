"""What a training step costs as documents, batches, ranks and vocabularies grow.

What: one forward and backward of a model of SmolLM2's shape (6 layers, random weights) at each
point, the median of several; slopes are fitted on a log-log scale, 1.0 being proportional. How:
points of a sweep take turns, so that a busy moment hits all of them. Constraint: memory is what
autograd keeps for backward, counted tensor by tensor, not the process's size.

    python benchmarks/scaling.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _report

HERE = Path(__file__).parent
TOKENS = 2048
WHY = {
    "length": "attention alone grows with the square of the length: its share is what bends it",
    "rows": "small batches do not fill the products; from about 16 rows on it is proportional",
    "rank": "the frozen products do not change; below rank 64 the adapters are the smaller part",
    "vocabulary": "only labelled rows meet the head, whose products are proportional to it",
}


def model(rank: int = 16, vocabulary: int = 49152) -> Any:
    """Random weights, adapters on every linear layer, ready to train."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finegraft.adapters import lora
    from finegraft.models import causal_loss, families

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    causal_loss.apply(made)
    families.apply(made)
    return lora.attach(made, r=rank).train()


def batch(rows: int, length: int, vocabulary: int = 49152) -> dict[str, Any]:
    """Documents of random tokens whose last third is labelled."""
    import torch

    from finegraft.training.collate import Collator

    generator = torch.Generator().manual_seed(rows + length)
    made = []
    for _ in range(rows):
        ids = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        cut = length - length // 3
        made.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return {**Collator(0, flat=True)(made), "use_cache": False}


def step(made: Any, inputs: dict[str, Any]) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    made(**inputs).loss.backward()
    seconds = time.perf_counter() - started
    made.zero_grad()
    return seconds


def sweeps(quick: bool) -> dict[str, list[tuple[int, Any, Any]]]:
    """Points of each sweep: (x, model, batch)."""
    base = model()
    lengths = [64, 512, 2048, 4096] if quick else [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    ranks = [1, 16, 64, 256] if quick else [1, 4, 16, 64, 128, 256]
    sizes = [4, 16, 64] if quick else [1, 2, 4, 8, 16, 32, 64]
    vocabularies = [8192, 49152, 131072] if quick else [8192, 32768, 49152, 131072, 262144]
    return {
        "length": [(n, base, batch(max(1, TOKENS // n), n)) for n in lengths],
        "rows": [(n, base, batch(n, 64)) for n in sizes],
        "rank": [(n, model(rank=n), batch(16, 64)) for n in ranks],
        "vocabulary": [(n, model(vocabulary=n), batch(16, 64, n)) for n in vocabularies],
    }


def measure(points: list[tuple[int, Any, Any]], sweep: str, rounds: int) -> list[dict[str, Any]]:
    """Median seconds and kept bytes of every point."""
    from finegraft.training.memory import kept_bytes

    seconds: dict[int, list[float]] = {x: [] for x, _, _ in points}
    for number in range(rounds + 1):
        for x, made, inputs in points:
            taken = step(made, inputs)
            if number:  # the first one compiles
                seconds[x].append(taken)
        print(f"{sweep}: round {number + 1}/{rounds + 1}", file=sys.stderr)
    rows = []
    for x, made, inputs in points:
        tokens = int(inputs["seq_lengths"][:-1].sum())
        median = statistics.median(seconds[x])
        rows.append(
            {
                "sweep": sweep,
                "x": x,
                "tokens": tokens,
                "seconds": median,
                "tokens_per_second": tokens / median,
                "kept_bytes_per_token": kept_bytes(made, inputs) / tokens,
            }
        )
    return rows


def slope(rows: list[dict[str, Any]], value: str) -> float:
    """Least-squares slope of log(value) over log(x), on the upper half of the points."""
    upper = rows[len(rows) // 2 - 1 :]
    xs = [math.log(row["x"]) for row in upper]
    ys = [math.log(row[value]) for row in upper]
    return statistics.linear_regression(xs, ys).slope


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = ["| sweep | x | tokens/s | kept for backward |", "|---|---:|---:|---:|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['sweep']} | {row['x']} | {row['tokens_per_second']:.0f} "
            f"| {row['kept_bytes_per_token'] / 1024:.0f} KB a token |"
        )
    lines += [""] + [
        f"- {name}: seconds a token grow with exponent {value:.2f}; {WHY[name]}."
        for name, value in result["ratios"].items()
    ]
    return "\n".join(lines)


def picture(result: dict[str, Any], path: Path) -> None:
    """Four panels of seconds a thousand tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for number, name in enumerate(WHY):
        rows = [row for row in result["rows"] if row["sweep"] == name]
        axes = figure.add_subplot(2, 2, number + 1)
        axes.plot([r["x"] for r in rows], [1000 / r["tokens_per_second"] for r in rows], "o-")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds a 1,000 tokens")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer points, under five minutes")
    parser.add_argument("--rounds", type=int, help="measured rounds of each sweep")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    import torch

    from finegraft.core.process import keep_freed_memory

    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    rounds = chosen.rounds or (3 if chosen.quick else 5)
    rows: list[dict[str, Any]] = []
    slopes = {}
    for name, points in sweeps(chosen.quick).items():
        found = measure(points, name, rounds)
        for row in found:
            row["seconds_per_token"] = row["seconds"] / row["tokens"]
        rows += found
        slopes[name] = slope(found, "seconds_per_token")
    result = {
        "name": "scaling",
        "task": "one forward and backward, SmolLM2's shape with 6 layers, LoRA r=16",
        "machine": _report.machine(chosen.threads),
        "versions": _report.versions(),
        "command": _report.command(),
        "rows": rows,
        "ratios": slopes,
        "roofline_fraction": None,
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / "scaling.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture(result, path.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
