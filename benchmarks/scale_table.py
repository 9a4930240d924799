"""What fits where: models of 7 to 70 billion parameters on 1 to 64 GPUs of 24, 48 and 80 GB.

What: the table of docs/scale.md, from the forecast's own formulas (``training.plan.estimate``), and
beside it what the same formulas say of runs of two processes that were measured. How:

    python benchmarks/scale_table.py            # prints
    python benchmarks/scale_table.py --write    # puts the tables into the page
    python benchmarks/scale_table.py --forecast --write    # after scale_measured.py

Constraint: nothing is downloaded or trained; shapes are those of published models. Trade-off: no
run of the large models was made, so the figures stand or fall with the assumptions, which the page
names: ``ASSUMPTIONS``.

Shapes: t tokens of a micro-batch, d hidden, n processes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core.schema import TrainConfig
from finegraft.training.plan import estimate
from finegraft.training.plan.anatomy import USUAL_KEPT, Anatomy, quantized_bytes
from finegraft.training.plan.workload import Workload

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
MEASURED = ROOT / "benchmarks" / "results" / "scale_measured.json"
FORECAST = ROOT / "benchmarks" / "results" / "scale_forecast.json"
MARKS = ("<!-- {}: begin -->", "<!-- {}: end -->")
GB = 10**9
MEMORY = (24, 48, 80)  # GB of a GPU
COUNTS = (1, 2, 4, 8, 16, 32, 64)
MARGIN = 0.9  # as ``plan.forecast``: within a tenth of what is there is not called fitting
ROWS, TOKENS, RANK = 4, 1024, 16
GATHERED = 2  # layers that stand whole in each process: the one that runs and the next
ASSUMPTIONS = (
    f"{ROWS} rows of {TOKENS:,} tokens a GPU and micro-batch, every token learnt; every layer "
    f"recomputed; LoRA of rank {RANK} on all linear maps, in float32; AdamW with two numbers for "
    "each that trains; NF4 with double quantization; full fine-tuning in bfloat16, optimizer "
    f"included; `fsdp2` keeps {GATHERED} layers whole at a time, and embedding and head always; "
    f"{MARGIN:.0%} of a GPU may be taken; what is sent is what a ring sends, for each GPU, one "
    "micro-batch a step"
)


@dataclass(frozen=True)
class Shape:
    """A decoder with gated layers; published shapes of the Llama family."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32_000

    @property
    def maps(self) -> list[tuple[int, int]]:
        """Widths of the linear maps of a layer."""
        kv = self.hidden // self.heads * self.key_value_heads
        d, inner = self.hidden, self.inner
        return [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]

    @property
    def layer(self) -> int:
        """Parameters of the linear maps of a layer."""
        return sum(a * b for a, b in self.maps)

    @property
    def parameters(self) -> int:
        """All of them: layers with two norms, the last norm, embedding and head."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer + norms + 2 * self.vocabulary * self.hidden

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA on all linear maps."""
        return self.layers * rank * sum(a + b for a, b in self.maps)


MODELS = {
    "7B": Shape(32, 4096, 11008, 32, 32),
    "13B": Shape(40, 5120, 13824, 40, 40),
    "34B": Shape(48, 8192, 22016, 64, 8),
    "70B": Shape(80, 8192, 28672, 64, 8),
}
WAYS = {  # what trains, and how: settings
    "LoRA, bf16": {},
    "LoRA, 4 bits": {"load_in_4bit": True},
    "every weight, bf16": {"full_finetuning": True},
}


def settings(**changes: Any) -> TrainConfig:
    """The settings that all rows of the table share."""
    shared = {"model": "-", "data": "-", "gradient_checkpointing": True, "max_length": TOKENS}
    return TrainConfig(**{**shared, "per_device_train_batch_size": ROWS, "r": RANK, **changes})


def anatomy(shape: Shape, config: TrainConfig) -> Anatomy:
    """A model as the forecast sees it, counted instead of built."""
    full = config.trains_all
    quantized = shape.layers * shape.layer if config.load_in_4bit else 0
    trained = shape.parameters if full else shape.adapter(config.r)
    weights = 2 * (shape.parameters - quantized) + quantized * quantized_bytes(config)
    return Anatomy(
        layers=shape.layers,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        itemsize=2,
        linear=shape.layers * shape.layer,
        quantized=quantized,
        parameters=shape.parameters,
        weight_bytes=round(weights),
        stacked_bytes=0,
        trained=trained,
        trained_bytes=trained * (2 if full else 4),
        trains_all=full,
        reaches_down=True,
        kept_layer=USUAL_KEPT * shape.hidden * 2,
        kept_once=0.0,
        flat=True,
        tokenizer_bytes=0,
        measured=False,
    )


def workload(tokens: int) -> Workload:
    """One micro-batch of full rows."""
    pairs = tokens * TOKENS
    return Workload(1, 1, tokens, tokens, pairs, 0, tokens, tokens, 0)


def parts(shape: Shape, config: TrainConfig, processes: int = 1) -> dict[str, int]:
    """Bytes of one GPU, by what takes them; ``processes`` above 1 share the layers.

    Where every weight trains, its gradient and the optimizer's numbers are shared as well.
    """
    there = estimate.Machine("cuda", 0, 0, 1.0)
    model = anatomy(shape, config)
    found = estimate.memory_parts(config, model, workload(ROWS * TOKENS), there, estimate.GPU)
    if processes > 1:
        inside = shape.layers * shape.layer / shape.parameters if config.trains_all else 0.0
        layers = 2 * shape.layers * shape.layer
        gathered = 2 * GATHERED * shape.layer
        found["weights"] += -layers + layers // processes + gathered
        for part in ("gradients", "optimizer"):
            found[part] -= round(inside * found[part] * (1 - 1 / processes))
        found["gradients"] += gathered if config.trains_all else 0
    return found


def sent(shape: Shape, config: TrainConfig, processes: int, sharded: bool) -> int:
    """Bytes that each GPU sends in a step of one micro-batch.

    Gradients of what trains are added up in a ring, 2 (n - 1) / n of their bytes; layers that are
    shared are put together for forward and once more for backward, (n - 1) / n of theirs each time,
    and where they train their gradients are handed out once.
    """
    share = (processes - 1) / processes
    layers = 2 * shape.layers * shape.layer
    total = 2 * share * anatomy(shape, config).trained_bytes
    if sharded:
        total += share * (2 * layers - (layers if config.trains_all else 0))
    return round(total)


def can_shard(config: TrainConfig) -> bool:
    """Whether ``--sharding fsdp2`` takes it: bases that are not quantized."""
    return not config.load_in_4bit


def fewest(shape: Shape, config: TrainConfig, memory: int) -> str:
    """The fewest GPUs of ``memory`` GB that hold it, and how."""
    room = MARGIN * memory * GB
    if sum(parts(shape, config).values()) <= room:
        return "1"
    if can_shard(config):
        for count in COUNTS[1:]:
            if sum(parts(shape, config, count).values()) <= room:
                return f"{count}, `fsdp2`"
    return "no"


def size(count: float) -> str:
    """Bytes with a unit that people read."""
    if count >= 10 * GB:
        return f"{count / GB:.0f} GB"
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.0f} MB"


def table() -> str:
    """What fits where."""
    head = ["model", "what trains", "one GPU needs", "8, `fsdp2`", "64, `fsdp2`"]
    head += [f"{memory} GB" for memory in MEMORY]
    head += ["sent: DDP, 8", "`fsdp2`, 8"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for name, shape in MODELS.items():
        for way, changes in WAYS.items():
            config = settings(**changes)
            shards = can_shard(config)
            cells = [name, way, size(sum(parts(shape, config).values()))]
            for count in (8, 64):
                shared = size(sum(parts(shape, config, count).values()))
                cells.append(shared if shards else "")
            cells += [fewest(shape, config, memory) for memory in MEMORY]
            cells.append(size(sent(shape, config, 8, False)))
            cells.append(size(sent(shape, config, 8, True)) if shards else "")
            lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def measured() -> dict[str, Any]:
    """What ``benchmarks/scale_measured.py`` found; empty where it was not run."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}


def forecast(processes: int, rows: int, sharded: bool, steps: int) -> dict[str, int]:
    """What the same formulas say of a measured run: bytes that a process holds, and bytes sent.

    A CPU's process also holds the interpreter; DDP gathers the gradients in buffers of their size;
    a base that is shared out was whole in each process while it was loaded.
    """
    from finegraft.training.plan.forecast import study
    from scale_measured import SETTINGS
    from scale_measured import rows as write_rows

    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder), rows * steps)
        config = TrainConfig(
            **{**SETTINGS, "data": str(data), "max_steps": steps, "data_check": False},
            per_device_train_batch_size=rows // processes,
        )
        found = study(config)
        needs = dict(found.of(config).parts)
    model = found.model
    layers = model.linear * model.itemsize
    gradients = 2 * (processes - 1) * model.trained_bytes
    if processes > 1:
        needs["buffers"] = model.trained_bytes
    loading = needs["interpreter and libraries"] + needs["weights"]
    if sharded:
        needs["weights"] += -layers + layers // processes + GATHERED * layers // model.layers
    return {
        "peak_memory_bytes": max(loading, sum(needs.values())),
        "bytes_a_step": gradients + (2 * (processes - 1) * layers if sharded else 0),
    }


def write_forecasts() -> None:
    """Ask the formulas about every measured run, on this machine."""
    found = measured()
    said = {
        name: forecast(
            one["processes"], one["rows_a_step"], one["sharding"] == "fsdp2", found["steps"]
        )
        for name, one in found["contenders"].items()
    }
    FORECAST.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def off(said: float, was: float) -> str:
    """How far a figure is from the measured one."""
    return f"{(said / was - 1) * 100:+.0f}%" if was else ""


def compared() -> str:
    """Measured runs beside what was said of them; a line of words where there are none."""
    found = measured()
    if not found or not FORECAST.is_file():
        return "Not measured yet."
    said = json.loads(FORECAST.read_text(encoding="utf-8"))
    lines = [
        ["run", "memory of a process", "forecast", "bytes of a step", "counted", "tokens/s"],
        ["---", *["---:"] * 5],
    ]
    for name, one in found["contenders"].items():
        peak, wire = max(one["peak_memory_bytes"]), one["loopback_bytes_a_step"]
        several = one["processes"] > 1
        counted = said[name]["bytes_a_step"]
        lines.append(
            [
                name,
                f"{peak / GB:.2f} GB",
                off(said[name]["peak_memory_bytes"], peak),
                size(wire) if several else "",
                f"{size(counted)} ({off(counted, wire)})" if several else "",
                f"{one['tokens_per_second']:.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def written(name: str, text: str, page: str) -> str:
    """``page`` with ``text`` between the marks of ``name``."""
    begin, end = (mark.format(name) for mark in MARKS)
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no {begin}")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def pieces() -> dict[str, str]:
    """What stands between the marks of the page."""
    return {"scale": f"Assumed: {ASSUMPTIONS}.\n\n{table()}", "compared": compared()}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument(
        "--forecast", action="store_true", help="first ask the formulas about the measured runs"
    )
    given = parser.parse_args()
    if given.forecast:
        write_forecasts()
    page = PAGE.read_text(encoding="utf-8") if given.write else ""
    for name, text in pieces().items():
        page = written(name, text, page) if given.write else page
        sys.stdout.write(text + "\n\n")
    if given.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
