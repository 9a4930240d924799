"""LoRA and QLoRA on one GPU: finegraft beside trl + peft, with Liger, and Unsloth, in one run.

What: models of three shapes with random weights train on the same packed rows with the same seeds
and settings, each contender in a process of its own with its own trainer and its own recommended
settings. How: a process builds the model on the device, trains, and reports the seconds of each
step (from its start to the next one's, the device waited for), the loss of each step and the peak
memory of training. Contenders alternate in rounds, the second round in reverse, because two models
of 8B weights do not fit one device; medians are over all steps after the first three. Constraint:
no network, nothing but the repository and what is installed. Trade-off: every round builds every
model again.

MFU = flops a token x tokens a second / the data sheet's dense bf16 rate, with
    flops a token = 4 x frozen weights in products (forward, gradient of the input)
                  + 6 x adapter weights
                  + 12 x layers x heads x features x keys that a token sees on average.
What a contender computes again to save memory is not counted.

    python benchmarks/gpu_sft.py [--models llama-3-8b] [--precisions nf4] [--tokens 2048]
    python benchmarks/gpu_sft.py --dry-run      # tiny, on the CPU
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

import _gpu
from _gpu import SHAPES

CONTENDERS = ("trl", "trl-liger", "unsloth", "finegraft")
LABELS = {
    "trl": "trl + peft (SDPA)",
    "trl-liger": "trl + peft (SDPA) + Liger",
    "unsloth": "Unsloth",
    "finegraft": "finegraft",
}
WARM_UP_STEPS = 3
TOKENS_A_STEP = 8192
R = 16


# In the contender's process


class Steps:
    """Seconds of each step and memory of the whole training."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []
        self.started: float | None = None

    def mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.started is None:
            if self.device.type == "cuda":  # making the model took more than training does
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        else:
            self.seconds.append(now - self.started)
        self.started = time.perf_counter()

    def memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"peak_memory_bytes": peak, "reserved_memory_bytes": peak}
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "reserved_memory_bytes": torch.cuda.max_memory_reserved(),
        }

    def callback(self) -> Any:
        from transformers import TrainerCallback

        steps = self

        class Mark(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                steps.mark()

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                steps.mark()

        return Mark()


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that are the same for every contender."""
    return {
        "output_dir": job["folder"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "seed": _gpu.SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
    }


def stock_settings(job: dict[str, Any]) -> dict[str, Any]:
    """trl's own way with packed rows; they come packed, so it only lays them out."""
    return {
        **settings(job),
        "bf16": job["device"] != "cpu",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "packing": True,
        "max_length": job["tokens"],
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def dataset(job: dict[str, Any]) -> Any:
    from datasets import Dataset

    import _gpu_models

    return Dataset.from_dict(_gpu_models.rows(job["batch"] * job["steps"], job["tokens"]))


def model_of(job: dict[str, Any]) -> Any:
    import _gpu_models

    shape = SHAPES[job["model"]]
    shape = shape.tiny() if job["dry_run"] else shape
    return _gpu_models.build(shape, job["precision"] == "nf4", torch.device(job["device"]))


def run_trl(job: dict[str, Any], steps: Steps, liger: bool) -> Any:
    import trl
    from peft import LoraConfig, get_peft_model

    import _gpu_models

    model = model_of(job)
    torch.manual_seed(_gpu.SEED)
    lora = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
    return trl.SFTTrainer(
        model=get_peft_model(model, lora),
        args=trl.SFTConfig(**stock_settings(job), use_liger_kernel=liger),
        train_dataset=dataset(job),
        processing_class=_gpu_models.tokenizer(),
        callbacks=[steps.callback()],
    )


def run_finegraft(job: dict[str, Any], steps: Steps) -> Any:
    import _gpu_models
    import finegraft

    model = finegraft.FastLanguageModel.get_peft_model(
        model_of(job), r=R, lora_alpha=R, random_state=_gpu.SEED
    )
    return finegraft.SFTTrainer(
        model=model,
        args=finegraft.SFTConfig(**settings(job), max_length=job["tokens"]),
        train_dataset=dataset(job),
        processing_class=_gpu_models.tokenizer(),
        callbacks=[steps.callback()],
    )


def run_unsloth(job: dict[str, Any], steps: Steps) -> Any:
    """Unsloth loads from a folder only: the 16-bit weights that ``checkpoint`` has written."""
    from unsloth import FastLanguageModel  # isort: skip - it must come before trl
    import trl

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["checkpoint"],
        max_seq_length=job["tokens"],
        dtype=torch.bfloat16,
        load_in_4bit=job["precision"] == "nf4",
    )
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    model = FastLanguageModel.get_peft_model(
        model, r=R, lora_alpha=R, target_modules=names.split(), random_state=_gpu.SEED
    )
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**stock_settings(job)),
        train_dataset=dataset(job),
        processing_class=tokenizer,
        callbacks=[steps.callback()],
    )


def checkpoint(job: dict[str, Any]) -> None:
    """Write the 16-bit model of this job as a folder."""
    import _gpu_models

    model_of({**job, "precision": "bf16"}).save_pretrained(job["checkpoint"])
    _gpu_models.tokenizer().save_pretrained(job["checkpoint"])


def work(contender: str, job: dict[str, Any]) -> dict[str, Any]:
    """Train as one contender and say how it went."""
    steps = Steps(torch.device(job["device"]))
    trainer = {
        "trl": lambda: run_trl(job, steps, False),
        "trl-liger": lambda: run_trl(job, steps, True),
        "unsloth": lambda: run_unsloth(job, steps),
        "finegraft": lambda: run_finegraft(job, steps),
    }[contender]()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    config = trainer.model.config.get_text_config()
    return {
        "seconds": steps.seconds,
        "losses": losses,
        "attention": getattr(config, "_attn_implementation", None),
        "trainable_weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        **steps.memory(),
    }


# In the benchmark's process


def absent(name: str, how: argparse.Namespace) -> str | None:
    """Why a contender cannot run here, None if it can."""
    package = {"trl-liger": "liger_kernel", "unsloth": "unsloth"}.get(name)
    if package is None:
        return None
    extra = how.unsloth_path if name == "unsloth" else None
    if not importlib.util.find_spec(package) and not (extra and (extra / package).exists()):
        return f"{package} is not installed"
    return "needs a GPU" if how.dry_run else None


def start(name: str, job: dict[str, Any], how: argparse.Namespace) -> dict[str, Any]:
    """Run one contender once, in a process of its own."""
    folder = Path(job["folder"])
    job_file, out = folder / "job.json", folder / f"{name}.json"
    job_file.write_text(json.dumps(job))
    out.unlink(missing_ok=True)
    path = [str(how.unsloth_path)] if name == "unsloth" and how.unsloth_path else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    log = folder / f"{name}.log"
    with open(log, "w") as file:
        command = [sys.executable, __file__, "--worker", name, str(job_file), str(out)]
        code = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
    if code == 0:
        return json.loads(out.read_text())
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    reason = (named or lines)[-1][:200]
    return {"failed": f"exit {code}: {reason}", "log": "\n".join(lines[-30:])}


def race(job: dict[str, Any], how: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model, precision and length."""
    names = [n for n in CONTENDERS if n in how.only]
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        reason = absent(name, how)
        rows[name] = {"failed": reason} if reason else {}
    if "unsloth" in rows and not rows["unsloth"]:
        written = start("checkpoint", job, how)
        rows["unsloth"] |= {k: v for k, v in written.items() if k == "failed"}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(how.rounds):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            if "failed" in rows[name]:
                continue
            found = start(name, job, how)
            if "failed" in found:
                print(found.pop("log"), file=sys.stderr)
                rows[name] = found
            runs[name].append(found)
            print(f"{case(job)}, round {turn + 1}, {name}", file=sys.stderr)
    about = {key: job[key] for key in ("model", "precision", "tokens")}
    return [
        {**about, "contender": name, **(row if "failed" in row else row_of(job, runs[name]))}
        for name, row in rows.items()
    ]


def row_of(job: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all rounds of one contender."""
    taken = [s for run in runs for s in run["seconds"][WARM_UP_STEPS:]]
    seconds = statistics.median(taken)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": job["batch"] * job["tokens"] / seconds,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "reserved_memory_bytes": max(run["reserved_memory_bytes"] for run in runs),
        "first_loss": runs[0]["losses"][0],
        "last_loss": statistics.median(run["losses"][-1] for run in runs),
        "steps": job["steps"],
        "rows": job["batch"] * job["steps"],
        "attention": runs[0]["attention"],
        "trainable_weights": runs[0]["trainable_weights"],
    }


def case(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['precision']}, {row['tokens']} tokens"


def flops_per_token(shape: _gpu.Shape, tokens: int, rows: int) -> float:
    """Of training with LoRA on all linear layers, every token labelled; see the module."""
    lengths = [n for row in range(rows) for n in _gpu.document_lengths(tokens, _gpu.SEED + row)]
    keys = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    attention = 12.0 * shape.layers * shape.heads * shape.features * keys
    return 4.0 * shape.frozen_products + 6.0 * shape.adapter_weights(R) + attention


def finish(rows: list[dict[str, Any]], how: argparse.Namespace) -> dict[str, Any]:
    """Rates against the probe and the data sheet, and the ratios to ours."""
    device = torch.device("cpu" if how.dry_run else "cuda")
    machine = _gpu.machine(device)
    rate = _gpu.product_rate(device)
    sheet = _gpu.DATA_SHEET.get(machine.get("gpu", ""))
    ratios: dict[str, Any] = {}
    for row in rows:
        if "failed" in row:
            continue
        shape = SHAPES[row["model"]]
        shape = shape.tiny() if how.dry_run else shape
        flops = flops_per_token(shape, row["tokens"], row["rows"]) * row["tokens_per_second"]
        row |= {"mfu": flops / sheet if sheet else None, "roofline_fraction": flops / rate}
    ours = {case(r): r for r in rows if r["contender"] == "finegraft" and "failed" not in r}
    for row in rows:
        own = ours.get(case(row))
        if own is None or row["contender"] == "finegraft" or "failed" in row:
            continue
        ratios.setdefault(case(row), {})[row["contender"]] = {
            "tokens_per_second": own["tokens_per_second"] / row["tokens_per_second"],
            "peak_memory": own["peak_memory_bytes"] / row["peak_memory_bytes"],
            "last_loss": own["last_loss"] / row["last_loss"],
        }
    return {
        "name": "gpu_sft",
        "task": f"LoRA r={R} on all linear layers, random weights, {TOKENS_A_STEP} tokens a step",
        "machine": machine,
        "versions": _gpu.versions(),
        "rows": rows,
        "ratios": ratios,
        "roofline_fraction": {name: row["roofline_fraction"] for name, row in ours.items()},
        "product_tflops": rate / 1e12,
        "data_sheet_tflops": sheet / 1e12 if sheet else None,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| model, base, row length | contender | tokens/s | MFU | peak memory | last loss "
        "| finegraft is |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        name = LABELS[row["contender"]]
        if "failed" in row:
            lines.append(f"| {case(row)} | {name} | {row['failed']} | | | | |")
            continue
        ratio = result["ratios"].get(case(row), {}).get(row["contender"], {})
        times = f"{ratio['tokens_per_second']:.2f}x" if ratio else ""
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        lines.append(
            f"| {case(row)} | {name} | {row['tokens_per_second']:.0f} | {mfu} "
            f"| {row['peak_memory_bytes'] / 1e9:.1f} GB | {row['last_loss']:.3f} | {times} |"
        )
    return "\n".join(lines)


def earlier(path: Path, done: set[str]) -> list[dict[str, Any]]:
    """Rows of cases that an earlier run on the same machine and versions has measured."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    same = before["versions"] == _gpu.versions() and before["machine"].get(
        "gpu"
    ) == torch.cuda.get_device_name(0)
    return [row for row in before["rows"] if same and case(row) not in done]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="*", choices=("nf4", "bf16"), default=["nf4", "bf16"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 8192], help="of a row")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=15, help="of each contender in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--unsloth-path", type=Path, help="folder with Unsloth and its own trl")
    parser.add_argument("--output", type=Path, default=_gpu.HERE / "results")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; writes elsewhere")
    how = parser.parse_args()
    if how.dry_run:
        how.models, how.precisions, how.tokens = how.models[:1], how.precisions[:1], [128]
        how.rounds, how.steps = 1, WARM_UP_STEPS + 1
        how.output = Path(tempfile.mkdtemp(prefix="finegraft-dry-run-"))
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry-run trains tiny models on the CPU")
    if "nf4" in how.precisions and not importlib.util.find_spec("bitsandbytes"):
        print("no nf4: bitsandbytes is not installed", file=sys.stderr)
        how.precisions = [p for p in how.precisions if p != "nf4"]
    return how


def main() -> None:
    how = arguments()
    rows: list[dict[str, Any]] = []
    for model in how.models:
        with tempfile.TemporaryDirectory() as folder:  # holds Unsloth's checkpoint of this model
            for precision in how.precisions:
                for tokens in how.tokens:
                    job = {
                        "model": model,
                        "precision": precision,
                        "tokens": tokens,
                        "batch": 2 if how.dry_run else max(TOKENS_A_STEP // tokens, 1),
                        "steps": how.steps,
                        "device": "cpu" if how.dry_run else "cuda",
                        "dry_run": how.dry_run,
                        "folder": folder,
                        "checkpoint": str(Path(folder) / "checkpoint"),
                    }
                    rows += race(job, how)
    path = how.output / "gpu_sft.json"
    done = {case(row) for row in rows}
    result = finish(earlier(path, done) + rows, how)
    bars = {
        f"{case(row)}, {row['contender']}": row["tokens_per_second"]
        for row in result["rows"]
        if "failed" not in row
    }
    _gpu.write(result, path, table(result), bars, "tokens a second")
    broken = [r for r in rows if "failed" in r and r["contender"] in ("trl", "finegraft")]
    if broken:
        raise SystemExit("; ".join(f"{case(r)}, {r['contender']}: {r['failed']}" for r in broken))


def worker(name: str, job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    if name == "checkpoint":
        if not Path(job["checkpoint"]).exists():
            checkpoint(job)
        found = {}
    else:
        found = work(name, job)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5])
    else:
        main()
