"""What an export needs in memory, above the model if one is loaded.

What: the demo model with a LoRA (rank 16, all linear layers), exported from its folder and from
memory, in every format; the largest anonymous memory during ``write`` less that before. How: one
process for each case; ``RssAnon`` of /proc is read every 2 ms beside the export. Constraint: pages
of the model's files count as the cache that they are, not as memory of the process; exports are not
verified, for that loads both models. Linux only.

    python benchmarks/export_memory.py [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _report

CASES = (
    ("folder", "merged_16bit", "5GB"),
    ("folder", "merged_16bit", "100MB"),
    ("folder", "merged_16bit", "30MB"),
    ("folder", "gguf:q8_0", ""),
    ("folder", "gguf:f16,gguf:q8_0,gguf:q4_k_m", ""),
    ("folder", "gguf_lora:f32", ""),
    ("folder", "lora", ""),
    ("memory", "merged_16bit", "5GB"),
    ("memory", "merged_16bit", "100MB"),
    ("memory", "merged_16bit", "30MB"),
    ("memory", "gguf:q8_0", ""),
    ("memory", "lora", ""),
)


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell RssAnon")


class Peak:
    """The largest ``anonymous_bytes`` while the block runs, less that before."""

    def __enter__(self) -> Peak:
        self.before = self.largest = anonymous_bytes()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.largest = max(self.largest, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.largest = max(self.largest, anonymous_bytes())

    @property
    def bytes(self) -> int:
        """What the block needed."""
        return self.largest - self.before


def adapter(folder: Path) -> None:
    """Save a LoRA on the demo model, its B matrices not zero."""
    import torch

    from finegraft import FastLanguageModel, opening

    model, tokenizer = FastLanguageModel.from_pretrained("demo", dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    opening.write_note(model, folder)


def case(source: str, to: str, shard: str, folder: str) -> dict[str, Any]:
    """Export once in this process."""
    import gc
    import logging

    import torch

    from finegraft import FastLanguageModel
    from finegraft.export import _save

    logging.disable()
    torch.set_num_threads(1)
    given: Any = folder
    if source == "memory":
        given = FastLanguageModel.from_pretrained(folder)
    options = {"max_shard_size": shard} if shard else {}
    with tempfile.TemporaryDirectory() as warm:  # imports and buffers that stay
        _save.export(given, Path(warm) / "x", to, verify=False, options=options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used again, unseen
    with tempfile.TemporaryDirectory() as out, Peak() as peak:
        started = time.perf_counter()
        done = _save.export(given, Path(out) / "x", to, verify=False, options=options)
        seconds = time.perf_counter() - started
    written = sum(one.bytes for one in done)
    return {"peak_bytes": peak.bytes, "written_bytes": written, "seconds": round(seconds, 2)}


def main() -> None:
    """Run every case in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--case", nargs=4, metavar=("SOURCE", "TO", "SHARD", "FOLDER"))
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(case(*asked.case)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        adapter(Path(folder))
        print(f"{'source':8} {'format':34} {'shard':7} {'peak MB':>8} {'files MB':>9} {'s':>6}")
        for source, to, shard in CASES:
            words = [sys.executable, __file__, "--case", source, to, shard, folder]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found.append({"source": source, "format": to, "shard": shard, **row})
            peak, written = row["peak_bytes"] / 1e6, row["written_bytes"] / 1e6
            print(f"{source:8} {to:34} {shard:7} {peak:8.0f} {written:9.0f} {row['seconds']:6.1f}")
    if asked.json:
        text = json.dumps({"machine": _report.machine(1), "cases": found}, indent=2)
        Path(asked.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
