"""Memory that ends in training: smaller micro-batches, the same steps, the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from training_tiny import llama, rows, tokenizer

from finegraft.core.errors import FinegraftError
from finegraft.core.schema import build, from_file
from finegraft.training import manifest, stepdown
from finegraft.training.events import read_events
from finegraft.training.run import train
from finegraft.training.sft import SFTTrainer

TOO_MUCH = 1 << 50  # bytes: no machine has them, so torch's own allocator refuses


@pytest.fixture
def place(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(22)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(output, **changes):
    values = {"model": "base", "data": "rows.jsonl", "output": output, "max_length": 64}
    values |= {"num_train_epochs": 2, "save_steps": 100, "dtype": "float32", "report_rows": 0}
    values |= {"share_prefix": False, "learning_rate": 1e-2, "seed": 5}
    return build({**values, **changes})


def documents(inputs):
    return int((inputs["seq_lengths"][:-1] > 0).sum())  # the last one is the filling


def failing(monkeypatch, when):
    """Let real allocations fail in the passes of which ``when(step, documents)`` says so."""
    stock = SFTTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = stock(self, model, inputs, *args, **kwargs)
        if self.model.training and when(self.state.global_step, documents(inputs)):
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)


def weights(result):
    return load_file(result.adapter / "adapter_model.safetensors")


def same(result, reference, tolerance=2e-5):
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(result)[name], value, rtol=1e-3, atol=tolerance)


def steps(result):
    events = read_events(result.run / "events.jsonl")
    return [e for e in events if e["type"] == "step"], [
        e for e in events if e["type"] == "step_down"
    ]


@pytest.mark.parametrize("fails_at", [0, 1, 3, 4])
def test_a_run_whose_memory_ends_is_the_run_that_had_more(place, monkeypatch, fails_at):
    """Of three steps an epoch: in the first, in the middle, first and second of the next epoch."""
    whole = train(settings("whole", per_device_train_batch_size=8))
    failing(monkeypatch, lambda step, count: step >= fails_at and count > 2)
    result = train(settings("run", per_device_train_batch_size=8))
    told, down = steps(result)
    assert [e["step"] for e in told] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in down] == [fails_at, fails_at]
    assert [e["per_device_train_batch_size"] for e in down] == [4, 2]
    assert [e["gradient_accumulation_steps"] for e in down] == [2, 4]
    assert "can't allocate memory" in down[0]["reason"]
    expected, _ = steps(whole)
    for line, wanted in zip(told, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], abs=2e-4)
        assert line["learning_rate"] == wanted["learning_rate"]
    assert result.tokens == whole.tokens and result.steps == whole.steps
    same(result, whole)


def test_the_change_is_kept_for_a_later_resume(place, monkeypatch):
    failing(monkeypatch, lambda step, count: step >= 2 and count > 4)
    result = train(settings("run", per_device_train_batch_size=8, max_steps=4, save_steps=3))
    saved = from_file(result.run / "config.yaml")
    assert (saved.per_device_train_batch_size, saved.gradient_accumulation_steps) == (4, 2)
    kept = {p.name: manifest.read(p) for p in (result.run / "checkpoints").glob("checkpoint-*")}
    assert kept and all(m["config"]["per_device_train_batch_size"] == 4 for m in kept.values())
    again = train(saved.model_copy(update={"max_steps": 6}), resume=True)
    assert again.steps == 6


def test_failing_in_the_optimizer_goes_back_to_the_newest_checkpoint(place, monkeypatch):
    whole = train(settings("whole", per_device_train_batch_size=8))
    spent = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.where = "update"
        if state.global_step == 3 and not spent:
            spent.append(True)
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    monkeypatch.setattr(stepdown._Steps, "on_pre_optimizer_step", on_pre_optimizer_step)
    result = train(settings("run", per_device_train_batch_size=8, save_steps=2))
    told, down = steps(result)
    assert [e["step"] for e in down] == [2]
    assert [e["step"] for e in told] == [1, 2, 3, 3, 4, 5, 6]  # 3 was taken back
    assert result.tokens == whole.tokens
    same(result, whole)


def test_failing_in_the_optimizer_before_the_first_checkpoint_is_told(place, monkeypatch):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.where = "update"
        torch.empty(TOO_MUCH, dtype=torch.uint8)

    monkeypatch.setattr(stepdown._Steps, "on_pre_optimizer_step", on_pre_optimizer_step)
    with pytest.raises(FinegraftError, match=r"(?s)FG-PLAN-011.*weights were being changed.*--fit"):
        train(settings("run", per_device_train_batch_size=8))


def test_after_one_row_every_layer_is_recomputed_and_then_it_is_said(place, monkeypatch):
    failing(monkeypatch, lambda step, count: True)
    heard = []
    with pytest.raises(FinegraftError, match=r"(?s)FG-PLAN-010.*one row at a time.*load-in-4bit"):
        train(settings("run", per_device_train_batch_size=6), listener=heard.append)
    down = [e for e in heard if e["type"] == "step_down"]
    assert [e.get("per_device_train_batch_size") for e in down] == [3, 1, None]
    assert down[-1]["gradient_checkpointing"] is True


def test_other_errors_are_left_alone(place, monkeypatch):
    def compute_loss(self, *args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(settings("run"))


def test_what_counts_as_the_end_of_memory():
    try:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    except RuntimeError as error:
        assert stepdown.is_out_of_memory(error)
    assert stepdown.is_out_of_memory(MemoryError())
    assert stepdown.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert stepdown.is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not stepdown.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


LIMITED = """
import json, sys
import torch
from finegraft.core import memory
from finegraft.core.schema import build
from finegraft.training import memory as kept
from finegraft.training.run import train
from finegraft.training.sft import SFTTrainer

limit = float(sys.argv[1])
stock, bounded = SFTTrainer.training_step, []

def training_step(self, model, inputs, *args):
    # the same bound for every attempt: what the process has before the second step, and a share
    # of what that step would keep
    if self.state.global_step == 1 and not bounded and limit:
        used = kept.kept_bytes(model, {**inputs, "use_cache": False})
        bounded.append(memory.bound_to(int(limit * used)))
        print("bound", used, flush=True)
    return stock(self, model, inputs, *args)

SFTTrainer.training_step = training_step
torch.set_num_threads(1)
train(build(json.loads(sys.argv[2])))
"""


def test_a_process_that_may_take_no_more_steps_down(place):
    """A real bound (RLIMIT_DATA), a real failure of malloc, in a process of its own."""
    llama(hidden_size=128, intermediate_size=256, num_hidden_layers=6).save_pretrained("base")
    words = " ".join(["hello world bye now you are so very kind today"] * 5)
    lines = [{"prompt": f"{words} {w}", "completion": words} for w in "abcdefgh" * 6]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    script = place / "limited.py"
    script.write_text(textwrap.dedent(LIMITED))
    for name, limit in (("whole", "0"), ("run", "0.75")):
        values = settings(name, per_device_train_batch_size=16, max_length=256).model_dump()
        values["max_steps"] = 4
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), limit, json.dumps(values)],
            # freed blocks go back to the system, so that each pass has to ask for its memory
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
            capture_output=True,
            text=True,
            timeout=200,
            cwd=place,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    told = {n: read_events(place / n / "events.jsonl") for n in ("whole", "run")}
    down = [e for e in told["run"] if e["type"] == "step_down"]
    assert down and down[0]["step"] == 1
    assert down[0]["per_device_train_batch_size"] == 8
    losses = {n: [e["loss"] for e in told[n] if e["type"] == "step"] for n in told}
    assert losses["run"] == pytest.approx(losses["whole"], abs=1e-3) and len(losses["run"]) == 4
    ends = {n: told[n][-1] for n in told}
    assert ends["run"]["type"] == "end" and ends["run"]["tokens"] == ends["whole"]["tokens"]
