"""Training on a corpus that is larger than what may be held: memory, and seconds to the first step.

What: rows of made text are written to a temporary folder (3 GB unless said otherwise), 20 steps are
trained on them through the command line, and the folder is removed. The same 20 steps on a thousand
of the rows, held in memory, say what the model and the libraries take. How:

    python benchmarks/stream_corpus.py --model tiny --model demo --out results.json

Constraint: memory is the high-water mark of the process that trained; seconds to the first step are
from the start of the command to the end of that step, imports and model included. Trade-off: the
text is made of few words, so tokens are cheaper to find than in real text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMAND = [str(Path(sys.executable).with_name("finegraft"))]
RESULTS = ROOT / "benchmarks" / "results" / "stream_corpus.json"
TEXT = (
    "a cold morning by the harbour boats leave early and men call across water while gulls turn "
    "over nets that dry in thin light someone counts crates twice writes down numbers then waits"
)
STEPS = 20
ROOM = 2  # times the corpus that the disk must have free
_BODIES = 5000  # different texts; every row has a number of its own
_ROWS_AT_ONCE = 20_000


def write_corpus(path: Path, bytes_: int, rows: int | None = None) -> int:
    """Write rows of about 1,000 characters until the file is so large; return their number."""
    draw = random.Random(0)
    bodies = []
    for _ in range(_BODIES):
        words = [draw.choice(TEXT.split()) for _ in range(draw.randint(60, 260))]
        third = len(words) // 3
        question, answer = " ".join(words[:third]), " ".join(words[third:])
        bodies.append(f' {question}", "completion": "{answer}"}}\n')
    count = 0
    with open(path, "w", encoding="utf-8") as out:
        while out.tell() < bytes_ and (rows is None or count < rows):
            size = min(_ROWS_AT_ONCE, rows or _ROWS_AT_ONCE)
            out.write(
                "".join(
                    f'{{"prompt": "{i}{bodies[(i * 7919) % _BODIES]}'
                    for i in range(count, count + size)
                )
            )
            count += size
    return count


def make_tiny(folder: Path) -> None:
    """A random llama of 4 layers with a tokenizer of bytes."""
    sys.path.insert(0, str(ROOT / "tests" / "e2e"))
    from command_line import make_model

    make_model(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=4)


def train(
    folder: Path, model: str, data: Path, name: str, steps: int, *more: str
) -> dict[str, Any]:
    """Run the command; seconds to the end of the first step, peak memory, tokens a second."""
    run = folder / name
    words = ["train", "--model", model, "--data", str(data), "--output", str(run)]
    words += ["--max-steps", str(steps), "--save-steps", str(steps // 2), "--json", *more]
    began = time.time()
    with open(folder / "stderr", "w", encoding="utf-8") as errors:
        child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=errors)
        printed = child.stdout.read() if child.stdout else b""
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError((folder / "stderr").read_text(encoding="utf-8")[-3000:])
    events = [json.loads(line) for line in (run / "events.jsonl").open(encoding="utf-8")]
    first = next(event for event in events if event["type"] == "step")
    return {
        "seconds_to_first_step": round(first["time"] - began, 2),
        "seconds": round(time.time() - began, 2),
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "tokens": json.loads(printed)["tokens"],
    }


def verified(folder: Path, name: str) -> bool:
    """Whether the second half of the run, trained again, gives the same bits."""
    words = ["resume", str(folder / name), "--verify", "--json"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    return bool(json.loads(done.stdout)["equal"])


def measure(model: str, gigabytes: float, steps: int, packing: bool) -> dict[str, Any]:
    """One model: streamed on all rows, and held in memory on a thousand of them."""
    with tempfile.TemporaryDirectory(prefix="finegraft-corpus-") as place:
        folder = Path(place)
        free = shutil.disk_usage(folder).free
        if free < ROOM * gigabytes * 1e9:
            raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free")
        if model == "tiny":
            make_tiny(folder / "tiny")
        name = str(folder / "tiny") if model == "tiny" else model
        more = ["--packing", "--per-device-train-batch-size", "2"] if packing else []
        write_corpus(folder / "few.jsonl", 1 << 40, rows=1000)
        held = train(
            folder, name, folder / "few.jsonl", "held", steps, "--streaming", "false", *more
        )
        rows = write_corpus(folder / "corpus.jsonl", int(gigabytes * 1e9))
        size = (folder / "corpus.jsonl").stat().st_size
        streamed = train(
            folder, name, folder / "corpus.jsonl", "streamed", steps, "--streaming", "true", *more
        )
        equal = verified(folder, "streamed")
    return {
        "corpus_bytes": size,
        "rows": rows,
        "steps": steps,
        "packing": packing,
        "streamed": streamed,
        "held_1000_rows": held,
        "beyond_bytes": streamed["peak_memory_bytes"] - held["peak_memory_bytes"],
        "resumed_equal": equal,
    }


def line(name: str, found: dict[str, Any]) -> str:
    """What a person reads."""
    one, few = found["streamed"], found["held_1000_rows"]
    return (
        f"{name}: {found['corpus_bytes'] / 1e9:.2f} GB, {found['rows']:,} rows; first step after "
        f"{one['seconds_to_first_step']:.1f} s (1,000 rows held: {few['seconds_to_first_step']:.1f}"
        f" s); peak {one['peak_memory_bytes'] / 1e9:.2f} GB, {found['beyond_bytes'] / 1e6:+.0f} MB "
        f"to 1,000 rows; resumed {'equal' if found['resumed_equal'] else 'DIFFERENT'}"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="tiny, demo, ...")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    for model in given.model or ["tiny", "demo"]:
        name = f"{model}, packed" if given.packing else model
        results[name] = measure(model, given.gigabytes, given.steps, given.packing)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(line(name, results[name]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
