"""One process against two on the same cores: tokens a second, memory, bytes on the wire.

What: SmolLM2-135M with a LoRA on all linears takes the same steps in one process with every core,
in two with half of the cores each (DDP), and in two whose frozen layers are split (FSDP2). How: the
real command line; events give the time of each step, /proc the memory of each process and the bytes
that went over the loopback interface between steps. Constraint: the same rows a step everywhere,
one at a time. Trade-off: two processes on one machine share its memory bandwidth, so this says what
a process costs, and not what a second machine gains.

    python benchmarks/scale_measured.py [--steps 14] [--rows 8]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
COMMAND = str(Path(sys.executable).with_name("finegraft"))
WARM_UP_STEPS = 3
SETTINGS = {
    "model": "demo",
    "dtype": "float32",
    "max_length": 256,
    "eval_fraction": 0,
    "report_rows": 0,
    "save_steps": 1000,
    "learning_rate": 2e-4,
}
CONTENDERS: dict[str, dict[str, Any]] = {
    "1 process": {"nproc": 1},
    "2 processes, ddp": {"nproc": 2},
    "2 processes, fsdp2": {"nproc": 2, "sharding": "fsdp2"},
}


def rows(folder: Path, count: int) -> Path:
    """Yoda rows, as the other benchmarks train on."""
    from finegraft.data import yoda

    file = folder / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for row in yoda.rows(720)[:count]:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def on_the_wire() -> int:
    """Bytes that the loopback interface has carried."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_recv


def peak(process: psutil.Process) -> int:
    """The most memory that a process has held, in bytes; 0 when it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return next((int(s.split()[1]) << 10 for s in text.splitlines() if s.startswith("VmHWM")), 0)


def steps(file: Path) -> list[dict[str, Any]]:
    """The step events so far."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    return [
        e for e in map(json.loads, filter(lambda s: s.endswith("}"), lines)) if e["type"] == "step"
    ]


def measure(name: str, place: Path, data: Path, count: int, batch: int) -> dict[str, Any]:
    """Run one contender."""
    settings = {**SETTINGS, **CONTENDERS[name], "data": str(data), "max_steps": count}
    settings["output"] = str(place / name.replace(" ", "-").replace(",", ""))
    settings["per_device_train_batch_size"] = batch // settings["nproc"]
    words = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    log = place / "log"
    events = Path(settings["output"]) / "events.jsonl"
    peaks: dict[int, int] = {}
    wire: dict[int, int] = {}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [COMMAND, "train", "--no-data-check", *words], env=env, stdout=out, stderr=out
        )
        own = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                inside = own.children() or [own]
            except psutil.NoSuchProcess:
                break
            for one in inside:
                peaks[one.pid] = max(peaks.get(one.pid, 0), peak(one))
            wire.setdefault(len(steps(events)), on_the_wire())
            time.sleep(0.1)
    if process.wait():
        raise SystemExit(log.read_text()[-3000:])
    return summary(steps(events), list(peaks.values()), wire, settings, events)


def summary(
    told: list[dict[str, Any]],
    peaks: list[int],
    wire: dict[int, int],
    settings: dict[str, Any],
    events: Path,
) -> dict[str, Any]:
    """The numbers of one contender."""
    warm = told[WARM_UP_STEPS - 1 :]
    pairs = list(itertools.pairwise(warm))
    seconds = [b["seconds"] - a["seconds"] for a, b in pairs]
    tokens = [b["tokens_per_second"] * s for (_, b), s in zip(pairs, seconds, strict=True)]
    seen = [n for n in sorted(wire) if n >= WARM_UP_STEPS]
    between = (wire[seen[-1]] - wire[seen[0]]) / max(1, seen[-1] - seen[0]) if seen else 0
    start = next(
        e for e in map(json.loads, events.read_text().splitlines()) if e["type"] == "start"
    )
    processes = settings["nproc"]
    gradient = start["trainable"] * 4
    return {
        "processes": processes,
        "sharding": settings.get("sharding", "none"),
        "threads_each": max(1, (os.cpu_count() or 1) // processes),
        "rows_a_step": start["batch"],
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
        "seconds_a_step": round(statistics.median(seconds), 3),
        "peak_memory_bytes": sorted(peaks, reverse=True)[:processes],
        "trainable": start["trainable"],
        "gradient_bytes": gradient,
        "ring_bytes_a_step": 2 * (processes - 1) * gradient,
        "loopback_bytes_a_step": round(between),
        "loss": told[-1]["loss"],
    }


def main() -> None:
    """Measure all contenders and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rows", type=int, default=8, help="rows a step, of all processes")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append")
    given = parser.parse_args()
    out = HERE / "results" / "scale_measured.json"
    found = json.loads(out.read_text()) if out.exists() and given.only else {"contenders": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = rows(Path(folder), given.rows * given.steps)
        for name in given.only or CONTENDERS:
            found["contenders"][name] = measure(name, Path(folder), data, given.steps, given.rows)
            print(name, json.dumps(found["contenders"][name]))
    found |= {"model": "demo (SmolLM2-135M)", "cores": os.cpu_count(), "steps": given.steps}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
