"""How near ``finegraft plan`` comes to what runs take: twelve configurations, each run for real.

What: for each configuration the forecast, the forecast after ``--probe``, and the run itself, each
in a process of its own through the command line; a table in docs/plan.md. How:

    python benchmarks/plan_accuracy.py run --only demo-batch-8 demo-packed --out results.json
    python benchmarks/plan_accuracy.py table --out results.json --write

``run`` adds to the file, so that it can be done in pieces. Constraint: seconds are those between
the first step and the saved result, as both sides count them; peak memory is the high-water mark of
the process that trained; a measurement during which other programs took more than a tenth of the
machine is not kept. Trade-off: runs of 10 to 40 s, so that the fixed costs of a run weigh more
than they do in an hour; the constants were fitted on other configurations of the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
COMMAND = [str(Path(sys.executable).with_name("finegraft"))]
MARKS = ("<!-- accuracy: begin -->", "<!-- accuracy: end -->")
TEXT = (
    "a cold morning by the harbour boats leave early and men call across water while gulls turn "
    "over nets that dry in thin light someone counts crates twice writes down numbers then waits"
)

# Share of the machine that other programs may take while a configuration is measured.
OTHERS = 0.1

CHAT, TEXTS = "demo", "classification"
# name: kind of rows, (rows, words a row, spread), settings
CONFIGURATIONS: dict[str, tuple[str, tuple[int, int, float], dict[str, Any]]] = {
    "demo, batch 8": (CHAT, (300, 60, 0.5), {"max_steps": 22}),
    "demo, batch 16, r 32": (
        CHAT,
        (300, 90, 0.3),
        {"max_steps": 10, "per_device_train_batch_size": 16, "r": 32},
    ),
    "demo, batch 1, accumulation 8": (
        CHAT,
        (200, 60, 0.5),
        {"max_steps": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    ),
    "demo, packed to 1,024": (
        CHAT,
        (400, 60, 0.5),
        {"max_steps": 8, "per_device_train_batch_size": 2, "packing": True},
    ),
    "demo, 400-token rows, recomputed": (
        CHAT,
        (80, 330, 0.2),
        {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_checkpointing": True},
    ),
    "demo, float32": (
        CHAT,
        (200, 90, 0.3),
        {"max_steps": 8, "per_device_train_batch_size": 4, "dtype": "float32"},
    ),
    "demo, 4 bits": (CHAT, (300, 60, 0.5), {"max_steps": 14, "load_in_4bit": True}),
    "demo, every weight": (
        CHAT,
        (200, 90, 0.3),
        {"max_steps": 10, "full_finetuning": True, "learning_rate": 5e-5},
    ),
    "demo-encoder, batch 16": (TEXTS, (2000, 35, 0.5), {"max_steps": 110, "max_length": 128}),
    "demo-encoder, float32, batch 8, r 64": (
        TEXTS,
        (1000, 50, 0.3),
        {"max_steps": 60, "dtype": "float32", "per_device_train_batch_size": 8, "r": 64},
    ),
    "demo-encoder, every weight": (
        TEXTS,
        (1200, 35, 0.5),
        {"max_steps": 70, "full_finetuning": True, "per_device_train_batch_size": 32},
    ),
    "tiny, batch 4": (
        "tiny",
        (400, 30, 0.5),
        {"max_steps": 150, "per_device_train_batch_size": 4},
    ),
}


def write_rows(path: Path, kind: str, rows: int, words: int, spread: float) -> None:
    """Rows of made text, whose lengths are drawn from a normal distribution."""
    draw, words_of_text = random.Random(rows * 1000 + words), TEXT.split()
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(rows):
            count = max(8, round(draw.gauss(words, spread * words)))
            text = [draw.choice(words_of_text) for _ in range(count)]
            third = max(3, count // 3)
            if kind == TEXTS:
                label = draw.choice(["calm", "rough"])
                row: dict[str, Any] = {"text": f"{label} {' '.join(text)}", "label": label}
            else:
                question, answer = " ".join(text[:third]), " ".join(text[third:])
                row = {"prompt": question, "completion": answer}
            out.write(json.dumps(row) + "\n")


def make_tiny(folder: Path) -> None:
    """A random llama of 4 layers with a tokenizer of bytes."""
    sys.path.insert(0, str(ROOT / "tests" / "e2e"))
    from command_line import make_model

    make_model(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=4)


def command(folder: Path, name: str) -> list[str]:
    """Flags of one configuration; its rows and model are made where they are not there."""
    kind, (rows, words, spread), settings = CONFIGURATIONS[name]
    data = folder / "rows.jsonl"
    write_rows(data, kind, rows, words, spread)
    model = {"demo": "demo", TEXTS: "demo-encoder", "tiny": str(folder / "tiny")}[kind]
    if kind == "tiny":
        make_tiny(folder / "tiny")
    task = ["--task", TEXTS] if kind == TEXTS else []
    flags = [*task, "--model", model, "--data", str(data)]
    for key, value in settings.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def busy_seconds() -> tuple[float, float]:
    """Processor time of the whole machine so far, and of this process's children."""
    with open("/proc/stat", encoding="ascii") as lines:
        ticks = [int(word) for word in lines.readline().split()[1:]]
    idle = ticks[3] + ticks[4]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    all_of_it = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
    return all_of_it, children.ru_utime + children.ru_stime


def answer(*words: str) -> tuple[dict[str, Any], float]:
    """Run one command line; return its JSON object and the share of the machine others took."""
    began, (machine, own) = time.monotonic(), busy_seconds()
    done = subprocess.run([*COMMAND, *words, "--json"], capture_output=True, text=True, timeout=220)
    wall, (machine_after, own_after) = time.monotonic() - began, busy_seconds()
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    others = (machine_after - machine) - (own_after - own)
    return json.loads(done.stdout), max(0.0, others) / wall / (os.cpu_count() or 1)


def measure(name: str) -> dict[str, Any]:
    """Forecast, probe and run of one configuration."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        flags = command(folder, name)
        output = ("--output", str(folder / "run"))
        said, first = answer("plan", *flags, *output)
        probed, second = answer("plan", *flags, "--probe", *output)
        _, third = answer("train", *flags, *output)
        lines = (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        end = next(e for e in map(json.loads, reversed(lines)) if e["type"] == "end")
        disk = sum(f.stat().st_size for f in (folder / "run").rglob("*") if f.is_file())
        shutil.rmtree(folder / "run")
    keys = ("peak_memory_bytes", "seconds")
    return {
        "plan": {key: said[key] for key in keys},
        "probe": {key: probed[key] for key in keys},
        "actual": {**{key: end[key] for key in keys}, "disk_bytes": disk},
        "others": round(max(first, second, third), 3),
        "disk_bytes": sum(n for part, n in said["disk_parts"].items() if part != "export"),
        "parts": said["parts"],
        "seconds_parts": said["seconds_parts"],
    }


def run(out: Path, only: list[str]) -> None:
    """Measure configurations that ``out`` does not hold yet, writing after each."""
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for name in only or CONFIGURATIONS:
        if name in results:
            continue
        found = measure(name)
        if found["others"] > OTHERS:
            sys.stdout.write(f"{name}: others took {found['others']:.0%}, not kept\n")
            sys.stdout.flush()
            continue
        results[name] = found
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{line(name, results[name])}\n")
        sys.stdout.flush()


def off(said: float, actual: float) -> str:
    """How far a figure is from the measured one."""
    return f"{(said / actual - 1) * 100:+.0f}%"


def line(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    said, probed, actual = found["plan"], found["probe"], found["actual"]
    peak, seconds = actual["peak_memory_bytes"], actual["seconds"]
    cells = [
        name,
        f"{peak / 1e9:.2f} GB",
        off(said["peak_memory_bytes"], peak),
        off(probed["peak_memory_bytes"], peak),
        f"{seconds:.1f} s",
        off(said["seconds"], seconds),
        off(probed["seconds"], seconds),
        off(found["disk_bytes"], actual["disk_bytes"]),
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, Any]) -> str:
    """All lines, and the worst of each column."""
    head = (
        "| configuration | peak memory | `plan` | `--probe` | time | `plan` | `--probe` | disk |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    worst = ["**farthest off**", ""]
    for key in ("peak_memory_bytes", "seconds"):
        for kind in ("plan", "probe"):
            far = max(abs(r[kind][key] / r["actual"][key] - 1) for r in results.values())
            worst.append(f"**{far * 100:.0f}%**")
        worst.append("")
    disk = max(abs(r["disk_bytes"] / r["actual"]["disk_bytes"] - 1) for r in results.values())
    worst[-1] = f"**{disk * 100:.0f}%**"
    lines = [line(name, results[name]) for name in CONFIGURATIONS if name in results]
    return "\n".join([head, *lines, "| " + " | ".join(worst) + " |"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table", "list"])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/plan_accuracy.json")
    parser.add_argument("--write", action="store_true", help="put the table into docs/plan.md")
    given = parser.parse_args()
    if given.what == "list":
        sys.stdout.write("\n".join(CONFIGURATIONS) + "\n")
        return
    if given.what == "run":
        run(given.out, given.only)
        return
    text = table(json.loads(given.out.read_text(encoding="utf-8")))
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        inner = f"{MARKS[0]}\n{text}\n{MARKS[1]}"
        pattern = re.compile(re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1]), re.DOTALL)
        PAGE.write_text(pattern.sub(lambda _: inner, page), encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
