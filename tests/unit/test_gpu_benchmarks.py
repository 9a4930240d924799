"""The GPU benchmarks run to the end in small on a CPU, and count what they say they count."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module", autouse=True)
def _import_from_benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def dry_run(script: str, folder: Path, *options: str) -> dict:
    """What the script writes; it must write it outside of the repository."""
    before = sorted(RESULTS.rglob("*"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--dry-run", *options],
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10_000:]
    assert sorted(RESULTS.rglob("*")) == before
    path = Path(re.search(r"^wrote (.*)$", done.stderr, re.MULTILINE).group(1))
    assert folder in path.parents and path.with_suffix(".png").stat().st_size > 1000
    assert done.stdout.startswith("| ")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "versions", "rows", "ratios", "roofline_fraction"} <= set(result)
    return result


def test_kernels_dry_run(tmp_path):
    result = dry_run("gpu_kernels.py", tmp_path)
    kernels = ROOT / "src" / "finegraft" / "kernels"
    ours = {row["op"]: row for row in result["rows"] if row["contender"] == "finegraft"}
    assert set(ours) == {path.parent.name for path in kernels.glob("*/triton.py")}
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["roofline_fraction"] > 0
        assert row["difference"] < 1e-4, row
    for case, ratios in result["ratios"].items():
        assert {"torch", "torch-compile"} <= set(ratios), case


def test_sft_dry_run(tmp_path):
    result = dry_run("gpu_sft.py", tmp_path)
    rows = {row["contender"]: row for row in result["rows"]}
    assert set(rows) == {"trl", "trl-liger", "unsloth", "finegraft"}
    for name in ("trl", "finegraft"):
        assert rows[name]["tokens_per_second"] > 0 and rows[name]["peak_memory_bytes"] > 0
    ours, stock = rows["finegraft"], rows["trl"]
    assert ours["first_loss"] == pytest.approx(stock["first_loss"], rel=5e-3)
    assert ours["last_loss"] == pytest.approx(stock["last_loss"], rel=5e-3)
    assert ours["last_loss"] < ours["first_loss"]
    assert ours["trainable_weights"] == stock["trainable_weights"]
    ratio = result["ratios"]["llama-3-8b, nf4, 128 tokens"]["trl"]["tokens_per_second"]
    assert ratio == pytest.approx(ours["tokens_per_second"] / stock["tokens_per_second"])


@pytest.mark.parametrize("name", ["llama-3-8b", "phi-3-mini", "qwen3-4b"])
def test_weights_are_counted_as_the_models_have_them(name):
    from peft import LoraConfig, get_peft_model

    import _gpu
    import _gpu_models

    shape = _gpu.SHAPES[name].tiny()
    model = _gpu_models.build(shape, nf4=False, device=torch.device("cpu"))
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear]
    assert sum(m.weight.numel() for m in linear) == shape.frozen_products
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == shape.adapter_weights(4)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 8.03), ("phi-3-mini", 3.82), ("qwen3-4b", 4.02)]
)
def test_shapes_have_the_published_number_of_weights(name, billions):
    import _gpu

    shape = _gpu.SHAPES[name]
    embedding = 0 if shape.tied else shape.vocabulary * shape.hidden
    assert (shape.frozen_products + embedding) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_same_seed_gives_the_same_weights_and_nf4_keeps_the_head():
    from bitsandbytes.nn import Linear4bit

    import _gpu
    import _gpu_models

    shape = _gpu.SHAPES["qwen3-4b"].tiny()
    made = [_gpu_models.build(shape, nf4, torch.device("cpu")) for nf4 in (False, False, True)]
    first, again, small = made
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    kinds = {name: type(m) for name, m in small.named_modules() if name.endswith("_proj")}
    assert set(kinds.values()) == {Linear4bit} and len(kinds) == 14
    assert torch.equal(small.lm_head.weight, first.lm_head.weight)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = first(ids).logits.float(), small(ids).logits.float()
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()


def test_rows_are_full_and_follow_their_rule():
    import _gpu_models

    rows = _gpu_models.rows(3, 700)
    assert [len(ids) for ids in rows["input_ids"]] == [700] * 3
    assert [sum(lengths) for lengths in rows["seq_lengths"]] == [700] * 3
    assert rows["labels"] == rows["input_ids"]
    start = 0
    for length in rows["seq_lengths"][0]:
        document = rows["input_ids"][0][start : start + length]
        start += length
        assert all((3 + ((a - 3) * 5 + 7) % 61) == b for a, b in itertools.pairwise(document))


def test_flops_of_a_token_follow_the_formula():
    import _gpu
    import gpu_sft

    shape = _gpu.SHAPES["llama-3-8b"]
    flops = gpu_sft.flops_per_token(shape, 2048, 1)
    lengths = _gpu.document_lengths(2048)
    keys = sum(n * (n + 1) / 2 for n in lengths) / 2048
    assert sum(lengths) == 2048 and 64 < keys < 1024
    adapters = 41_943_040  # r 16 on all linear layers of Llama-3-8B, as peft prints it
    frozen = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # all but the embedding and the norms
    assert flops == 4 * frozen + 6 * adapters + 12 * 32 * 4096 * keys


def test_medians_leave_the_warm_up_out():
    import gpu_sft

    job = {"batch": 4, "tokens": 2048, "steps": 5}
    run = {
        "seconds": [9.0, 9.0, 9.0, 2.0, 2.0],
        "losses": [5.0, 4.0, 3.0, 2.0, 1.0],
        "peak_memory_bytes": 10,
        "reserved_memory_bytes": 12,
        "attention": "sdpa",
        "trainable_weights": 1,
    }
    row = gpu_sft.row_of(job, [run, {**run, "seconds": [9.0, 9.0, 9.0, 4.0, 2.0]}])
    assert row["seconds_per_step"] == 2.0 and row["tokens_per_second"] == 4096
    assert (row["first_loss"], row["last_loss"]) == (5.0, 1.0)


def test_without_a_gpu_a_real_run_says_so():
    if torch.cuda.is_available():
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment = dict(os.environ)
    for script in ("gpu_kernels.py", "gpu_sft.py"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / script)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "no CUDA device; --dry-run" in done.stderr
