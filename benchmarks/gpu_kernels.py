"""Every Triton kernel beside plain torch, torch.compile and Liger, on one GPU, in one run.

What: forward, and forward with backward, at the shapes of three models: median time of alternating
calls, rate, peak memory, and the share of what a copy or a matrix product reaches on the same
device in the same run. How: an operation is found by its ``triton.py``; one that has no inputs
below is an error, not a gap. Constraint: each contender's result is compared with
plain torch before it is timed, and ours must agree. Trade-off: caches are emptied before each call,
so rates are those of cold inputs.

    python benchmarks/gpu_kernels.py [--models llama-3-8b] [--ops rms_norm] [--tokens 8192]
    python benchmarks/gpu_kernels.py --dry-run     # tiny, on the CPU, in Triton's interpreter
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

import _gpu
from _gpu import SHAPES, Clock, Shape

TOLERANCE = 0.02  # of the norm; bfloat16 rounds by 0.004, and gradients add up a few of these


@dataclass(frozen=True)
class Work:
    """One call of an operation and what it must at least do.

    Attributes:
        inputs: By name, in the order in which the reference takes them.
        grads: Inputs that are differentiated.
        bytes: Read and written at least, forward; forward and backward.
        flops: In matrix products, likewise; zero where memory is what bounds it.
        peers: Other implementations, by contender, called with the same inputs.
        function: Name in ``triton.py`` where it is not the operation's.
    """

    inputs: dict[str, Any]
    grads: tuple[str, ...]
    bytes: tuple[float, float] = (0, 0)
    flops: tuple[float, float] = (0, 0)
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    function: str | None = None


class Maker:
    """Makes the inputs of each operation; a method is named after its operation."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.tokens, self.device, self.dtype = shape, tokens, device, dtype
        self.size = torch.empty((), dtype=dtype).element_size()
        self.liger = None
        if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            self.liger = importlib.import_module("liger_kernel.transformers.functional")

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def with_liger(self, make: Callable[[Any], Callable[..., Any]]) -> dict[str, Any]:
        return {"liger": make(self.liger)} if self.liger is not None else {}

    def rms_norm(self) -> Work:
        d = self.shape.hidden
        n = self.tokens * d * self.size
        return Work(
            {"x": self.normal(self.tokens, d), "weight": self.normal(d), "eps": self.shape.eps},
            ("x",),
            bytes=(2 * n, 5 * n),
            peers=self.with_liger(
                # In place it would write into the gradient that every contender is given.
                lambda k: lambda x, weight, eps: k.liger_rms_norm(x, weight, eps, in_place=False)
            ),
        )

    def add_rms_norm(self) -> Work:
        d = self.shape.hidden
        n = self.tokens * d * self.size

        def of(k: Any) -> Callable[..., Any]:
            def call(x: Any, delta: Any, weight: Any, eps: float) -> Any:
                normed, total = k.liger_fused_add_rms_norm(delta, x, weight, eps, in_place=False)
                return total, normed

            return call

        inputs = {name: self.normal(self.tokens, d) for name in ("x", "delta")}
        inputs |= {"weight": self.normal(d), "eps": self.shape.eps}
        return Work(inputs, ("x", "delta"), bytes=(4 * n, 8 * n), peers=self.with_liger(of))

    def _gated(self, name: str) -> Work:
        f = self.shape.intermediate
        n = self.tokens * f * self.size
        return Work(
            {"gate": self.normal(self.tokens, f), "up": self.normal(self.tokens, f)},
            ("gate", "up"),
            bytes=(3 * n, 8 * n),
            peers=self.with_liger(lambda k: lambda gate, up: getattr(k, name)(gate, up)),
        )

    def swiglu(self) -> Work:
        return self._gated("liger_swiglu")

    def geglu(self) -> Work:
        return self._gated("liger_geglu")

    def rotary(self) -> Work:
        # Liger has no kernel for one tensor alone: it rotates q and k in place, together.
        h, f = self.shape.heads, self.shape.features
        angle = torch.rand(self.tokens, f // 2, device=self.device) * 6
        n = self.tokens * h * f * self.size
        return Work(
            {
                "x": self.normal(self.tokens, h, f),
                "cos": angle.cos().to(self.dtype),
                "sin": angle.sin().to(self.dtype),
            },
            ("x",),
            bytes=(2 * n, 4 * n),
        )

    def linear_cross_entropy(self) -> Work:
        n, d, v = self.tokens, self.shape.hidden, self.shape.vocabulary

        def of(k: Any) -> Callable[..., Any]:
            def call(hidden: Any, weight: Any, labels: Any, num_items: float) -> Any:
                lce = k.liger_fused_linear_cross_entropy
                return lce(hidden, weight, labels, reduction="sum") / num_items

            return call

        return Work(
            {
                "hidden": self.normal(n, d),
                "weight": self.normal(v, d) / d**0.5,
                "labels": torch.randint(0, v, (n,), device=self.device),
                "num_items": float(n),
            },
            ("hidden",),
            flops=(2.0 * n * d * v, 4.0 * n * d * v),
            peers=self.with_liger(of),
        )

    def nf4(self) -> Work:
        rows, columns, block = self.shape.intermediate, self.shape.hidden, 64
        n = rows * columns
        packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device=self.device)
        absmax = torch.rand(n // block, device=self.device) + 0.5
        peers = {}
        if self.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
            peers["bitsandbytes"] = _bitsandbytes
        return Work(
            {
                "packed": packed,
                "absmax": absmax,
                "blocksize": block,
                "shape": (rows, columns),
                "dtype": self.dtype,
            },
            (),
            bytes=(n / 2 + 4 * n / block + n * self.size, 0),
            peers=peers,
            function="dequantize",
        )

    def document_attention(self) -> Work:
        from finegraft.kernels.document_attention import Documents

        s = self.shape
        documents = Documents(_gpu.document_lengths(self.tokens))
        pairs = sum(n * (n + 1) / 2 for n in documents.lengths)
        forward = 4.0 * s.heads * s.features * pairs  # two products; backward needs five
        peers: dict[str, Callable[..., Any]] = {"sdpa": _sdpa}
        if self.device.type == "cuda":
            peers |= _variable_length(documents, self.device)
        return Work(
            {
                "query": self.normal(self.tokens, s.heads, s.features),
                "key": self.normal(self.tokens, s.key_heads, s.features),
                "value": self.normal(self.tokens, s.key_heads, s.features),
                "documents": documents,
                "scale": s.features**-0.5,
            },
            ("query", "key", "value"),
            flops=(forward, 3.5 * forward),
            peers=peers,
        )


def _bitsandbytes(packed: Any, absmax: Any, blocksize: int, shape: Any, dtype: Any) -> Any:
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    code = get_4bit_type("nf4", device=packed.device, blocksize=blocksize)
    state = QuantState(absmax, torch.Size(shape), code, blocksize, "nf4", dtype)
    return dequantize_4bit(packed.view(-1, 1), state)


def _sdpa(query: Any, key: Any, value: Any, documents: Any, scale: float) -> Any:
    """torch's own attention, document by document, without a mask, so that it may take flash."""
    outs = []
    for start, length in documents.spans():
        q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _variable_length(documents: Any, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Attention of torch and of flash-attn that takes lengths, where they are there."""
    ends = torch.tensor([0, *documents.lengths]).cumsum(0).to(device, torch.int32)
    longest = max(documents.lengths)
    found: dict[str, Callable[..., Any]] = {}
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters  # its names have changed before
        causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

        def varlen(query: Any, key: Any, value: Any, documents: Any, scale: float) -> Any:
            groups = query.shape[1] // key.shape[1]  # not every version takes fewer key heads
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            return varlen_attn(query, key, value, ends, ends, longest, longest, **causal)

        found["torch-varlen"] = varlen
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        def flash(query: Any, key: Any, value: Any, documents: Any, scale: float) -> Any:
            return flash_attn_varlen_func(
                query, key, value, ends, ends, longest, longest, softmax_scale=scale, causal=True
            )

        found["flash-attn"] = flash
    return found


def operations() -> list[str]:
    """Operations that have a Triton implementation."""
    folder = _gpu.SOURCE / "finegraft" / "kernels"
    found = sorted(path.parent.name for path in folder.glob("*/triton.py"))
    missing = [name for name in found if not hasattr(Maker, name)]
    if missing:
        raise SystemExit(f"no inputs for {', '.join(missing)}: add a method to Maker")
    return found


def contenders(op_name: str, work: Work, compiler: str | None) -> dict[str, Callable[..., Any]]:
    """The implementations of one operation by name, ours last."""
    from finegraft.core.registry import Registry

    op: Any = Registry("finegraft.kernels", "OP", "kernel").get(op_name)
    module = importlib.import_module(f"finegraft.kernels.{op_name}.triton")
    compiled = {}
    if compiler:
        compiled["torch-compile"] = torch.compile(op.reference, backend=compiler, dynamic=False)
    return {
        "torch": op.reference,
        **compiled,
        **work.peers,
        "finegraft": getattr(module, work.function or op_name),
    }


def call(function: Callable[..., Any], work: Work, backward: bool) -> Callable[[], Any]:
    """The call that is timed: the forward's result, or the gradients."""
    if not backward:
        return torch.no_grad()(functools.partial(function, *work.inputs.values()))
    leaves = {name: work.inputs[name].detach().requires_grad_() for name in work.grads}
    directions: list[torch.Tensor] = []

    def run() -> Any:
        out = function(*{**work.inputs, **leaves}.values())
        outs = out if isinstance(out, tuple) else (out,)
        if not directions:  # made once, before anything is timed
            generator = torch.Generator(outs[0].device).manual_seed(5)
            directions.extend(
                torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outs
            )
        return torch.autograd.grad(outs, list(leaves.values()), directions)

    return run


def distance(found: Any, expected: Any) -> float:
    """Largest norm of a difference over the norm of what is expected."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
    return max(
        float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)) for a, b in pairs
    )


def measure(op: str, maker: Maker, clock: Clock, rates: dict[str, float], how: Any) -> Iterator:
    """Rows of one operation at one shape."""
    work: Work = getattr(maker, op)()
    functions = contenders(op, work, how.compiler)
    for backward in (False, True) if work.grads else (False,):
        calls, failed, errors = {}, {}, {}
        expected = None
        for name, function in functions.items():
            timed = call(function, work, backward)
            try:
                found = timed()
                clock.synchronize()
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                if name == "finegraft":  # a peer may run out of memory or have changed; we may not
                    raise
                failed[name] = _gpu.first_line(error)
                torch.cuda.empty_cache()
                continue
            expected = found if expected is None else expected
            errors[name], calls[name] = distance(found, expected), timed
            del found
        if len(calls) == 1:
            raise SystemExit(f"{op}: nothing to compare with: {failed}")
        if errors["finegraft"] > TOLERANCE:
            raise SystemExit(f"{op}: finegraft is {errors['finegraft']:.3g} away from plain torch")
        expected = None
        seconds = clock.alternate(calls, how.rounds)
        for name in functions:
            row = {
                "op": op,
                "model": maker.shape.name,
                "tokens": maker.tokens,
                "pass": "forward and backward" if backward else "forward",
                "contender": name,
            }
            if name in failed:
                yield {**row, "failed": failed[name]}
                continue
            moved, flops = work.bytes[backward], work.flops[backward]
            bound = flops / rates["products"] if flops else moved / rates["copies"]
            yield {
                **row,
                "seconds": seconds[name],
                "tflops": flops / seconds[name] / 1e12 if flops else None,
                "gb_per_second": moved / seconds[name] / 1e9 if moved else None,
                "roofline_fraction": bound / seconds[name],
                "peak_memory_bytes": clock.peak_bytes(calls[name]),
                "difference": errors[name],
            }


def key(row: dict[str, Any]) -> str:
    return f"{row['op']}, {row['model']}, {row['tokens']} tokens, {row['pass']}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| operation, model, tokens, pass | contender | ms | rate | of the bound | peak memory |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {key(row)} | {row['contender']} | {row['failed']} | | | |")
            continue
        rate = f"{row['gb_per_second'] or 0:.0f} GB/s"
        if row["tflops"]:
            rate = f"{row['tflops']:.1f} TFLOP/s"
        memory = row["peak_memory_bytes"]
        peak = "" if memory is None else f"{memory / 1e6:.0f} MB"
        lines.append(
            f"| {key(row)} | {row['contender']} | {row['seconds'] * 1e3:.3f} | {rate} "
            f"| {row['roofline_fraction']:.0%} | {peak} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]], rates: dict[str, float], device: Any) -> dict[str, Any]:
    """The result: how many times faster ours is than each contender, case by case."""
    ours = {key(row): row for row in rows if row["contender"] == "finegraft"}
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["contender"] != "finegraft" and "failed" not in row:
            ratio = row["seconds"] / ours[key(row)]["seconds"]
            ratios.setdefault(key(row), {})[row["contender"]] = ratio
    return {
        "name": "gpu_kernels",
        "task": "Triton kernels beside plain torch, torch.compile and Liger",
        "machine": _gpu.machine(device),
        "versions": _gpu.versions(),
        "rows": rows,
        "ratios": ratios,
        "roofline_fraction": {name: row["roofline_fraction"] for name, row in ours.items()},
        "product_tflops": rates["products"] / 1e12,
        "copy_gb_per_second": rates["copies"] / 1e9,
    }


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ops", nargs="*", choices=operations(), default=operations())
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contender")
    parser.add_argument("--output", type=Path, default=_gpu.HERE / "results")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; writes elsewhere")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    how = parser.parse_args()
    how.compiler = None if how.no_compile else "inductor"
    if how.dry_run:
        how.models, how.tokens, how.rounds = how.models[:1], [72], 1
        how.compiler = "eager"  # graph capture only; a C++ compiler would take a minute
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later
        how.output = Path(tempfile.mkdtemp(prefix="finegraft-dry-run-"))
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry-run runs tiny shapes on the CPU")
    return how


def main() -> None:
    how = settings()
    device = torch.device("cpu" if how.dry_run else "cuda")
    # The interpreter multiplies bfloat16 numbers as integers, so a dry run is in float32.
    dtype = torch.float32 if how.dry_run else torch.bfloat16
    torch.manual_seed(_gpu.SEED)
    rates = {"products": _gpu.product_rate(device), "copies": _gpu.copy_rate(device)}
    clock, rows = Clock(device), []
    for model in how.models:
        shape = SHAPES[model].tiny() if how.dry_run else SHAPES[model]
        for tokens in how.tokens:
            for op in how.ops:
                maker = Maker(shape, tokens, device, dtype)
                torch.compiler.reset()  # shapes are compiled for each case, as if it were alone
                rows += measure(op, maker, clock, rates, how)
                print(f"{model} {tokens} {op}", file=sys.stderr)
    result = summary(rows, rates, device)
    bars = {
        name: math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        for name, ratios in result["ratios"].items()
    }
    path = how.output / "gpu_kernels.json"
    _gpu.write(result, path, table(rows), bars, "times faster, geometric mean over contenders")


if __name__ == "__main__":
    main()
