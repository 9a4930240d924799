"""Forecasts: what is counted is what a run has, and choices keep a step's rows."""

from __future__ import annotations

import json

import pytest
import torch
from training_tiny import llama, rows, tokenizer

from finegraft.core import memory as there
from finegraft.core.errors import ConfigError
from finegraft.core.schema import build
from finegraft.training import plan
from finegraft.training.events import EventLog, read_events
from finegraft.training.plan import forecast
from finegraft.training.plan.anatomy import anatomy
from finegraft.training.plan.workload import drawn, rows_of, workload
from finegraft.training.run import train
from finegraft.training.tasks import TASKS


@pytest.fixture
def place(tmp_path, monkeypatch):
    llama(num_hidden_layers=4).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(40)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes):
    values = {"model": "base", "data": "rows.jsonl", "output": "run", "max_length": 64}
    return build({**values, "dtype": "float32", "report_rows": 0, **changes})


def counted(config):
    data = TASKS.get(config.task).check(config, EventLog())
    sample = drawn(config, rows_of(config, data.train, data.tokenizer))[0]
    return data, anatomy(config, data, sample)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"method": "bottleneck"},
        {"method": "prefix"},
        {"full_finetuning": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_parameters_and_bytes_are_those_of_the_built_model(place, changes):
    config = settings(**changes)
    data, found = counted(config)
    trainer = TASKS.get("causal").build(config, data)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert found.trained == sum(p.numel() for p in trained)
    assert found.trained_bytes == sum(p.numel() * p.itemsize for p in trained)
    base = trained if config.trains_all else frozen
    assert found.weight_bytes == sum(p.numel() * p.itemsize for p in base)
    assert found.layers == 4 and found.measured


def test_kept_bytes_of_two_layers_speak_for_all(place):
    """Against the real model of four layers, on the very rows of a micro-batch."""
    from finegraft.training import memory

    config = settings()
    data, found = counted(config)
    trainer = TASKS.get("causal").build(config, data)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    real = memory.kept_bytes(trainer.model, {**batch, "use_cache": False})
    tokens = batch["input_ids"].numel()
    assert tokens * (4 * found.kept_layer + found.kept_once) == pytest.approx(real, rel=0.15)


def test_nothing_of_the_model_is_loaded_and_no_random_number_is_drawn(place):
    (place / "base" / "model.safetensors").write_bytes(b"not weights")
    before = torch.get_rng_state()
    made = plan.study(settings()).of(settings())
    assert made.peak_memory_bytes > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_epochs": 2, "per_device_train_batch_size": 8},
        {"max_steps": 7, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1, "packing": True, "per_device_train_batch_size": 2},
        {"num_train_epochs": 1, "eval_fraction": 0.25, "save_steps": 2},
    ],
)
def test_steps_tokens_and_saves_are_those_of_the_run(place, changes):
    config = settings(**changes)
    made = plan.study(config).of(config)
    result = train(config)
    events = read_events(result.run / "events.jsonl")
    assert made.steps == result.steps
    # filling to 32 tokens a micro-batch is counted as well
    data, found = counted(config)
    work = workload(config, data, flat=found.flat)
    assert result.tokens <= work.tokens <= result.tokens + 32 * work.micro_batches
    kinds = [e["type"] for e in events]
    assert work.saves == kinds.count("save")
    assert work.evaluations == kinds.count("eval")


def test_a_run_tells_its_forecast_and_what_it_took(place):
    train(settings(max_steps=2))
    events = read_events(place / "run" / "events.jsonl")
    said = next(e for e in events if e["type"] == "forecast")
    end = events[-1]
    assert said["peak_memory_bytes"] == sum(said["parts"].values())
    assert set(said) >= {"seconds", "disk_bytes", "fits", "steps", "tokens", "available_bytes"}
    assert end["peak_memory_bytes"] > said["parts"]["weights"] and end["seconds"] > 0
    kinds = [e["type"] for e in events]
    assert kinds.index("forecast") < kinds.index("start")


def available(monkeypatch, count):
    """A machine with so much memory, the process included."""
    monkeypatch.setattr(forecast, "available_bytes", lambda: int(count))
    # memory.plan would recompute layers by itself; here the choice is to be seen
    monkeypatch.setattr(forecast, "_as_recomputed", lambda config, model, work, made: made)


def test_what_fits_is_left_alone(place):
    chosen = plan.fitting(settings())
    assert chosen.changed == {} and chosen.config == settings()


def test_the_cheapest_change_that_fits_is_taken(place, monkeypatch):
    monkeypatch.setattr(forecast, "resident_bytes", lambda: 0)
    config = settings(per_device_train_batch_size=12, gradient_accumulation_steps=2)
    studied = plan.study(config)
    sizes = {
        size: studied.of(
            config.model_copy(
                update={
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": 24 // size,
                }
            )
        ).peak_memory_bytes
        for size in (12, 6, 3, 1)
    }
    assert sizes[12] > sizes[6] > sizes[3] > sizes[1]
    available(monkeypatch, (sizes[6] + sizes[3]) / 2 / 0.9)
    chosen = plan.fitting(config)
    assert chosen.changed == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 8}
    assert chosen.after.fits and not chosen.before.fits
    assert "the same 24 rows a step" in " ".join(chosen.why)
    assert chosen.as_flags() == "--per-device-train-batch-size 3 --gradient-accumulation-steps 8"


def test_recomputing_and_4_bits_come_last(place, monkeypatch):
    monkeypatch.setattr(forecast, "resident_bytes", lambda: 0)
    config = settings(per_device_train_batch_size=2)
    studied = plan.study(config)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    again = {**small, "gradient_checkpointing": True}
    peaks = [studied.of(config.model_copy(update=c)).peak_memory_bytes for c in (small, again)]
    assert peaks[0] > peaks[1]
    available(monkeypatch, (peaks[0] + peaks[1]) / 2 / 0.9)
    assert "gradient_checkpointing" in plan.fitting(config).changed


def test_nothing_fits(place, monkeypatch):
    monkeypatch.setattr(forecast, "resident_bytes", lambda: 0)
    available(monkeypatch, 1e6)
    with pytest.raises(
        ConfigError, match=r"(?s)FG-PLAN-001.*1\.0 MB.*load-in-4bit.*smaller --model"
    ):
        plan.fitting(settings())


@pytest.mark.parametrize("names", ["v2", "v1"])
def test_the_limit_of_a_control_group_is_the_memory_there_is(tmp_path, names):
    where = tmp_path if names == "v2" else tmp_path / "memory"
    where.mkdir(exist_ok=True)
    files = {
        "v2": ("memory.max", "memory.current", "inactive_file"),
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[names]
    (where / files[0]).write_text("1000000\n")
    (where / files[1]).write_text("400000\n")
    (where / "memory.stat").write_text(f"anon 300000\n{files[2]} 50000\n")
    assert there._group_bytes(tmp_path) == 650_000
    (where / files[0]).write_text("max\n")
    assert there._group_bytes(tmp_path) > 1 << 50


def test_the_peak_is_at_least_what_is_held_now():
    block = torch.ones(30_000_000)
    assert there.peak_bytes() >= there.resident_bytes() - (1 << 24) > block.nbytes


def test_a_bound_makes_an_allocation_fail_and_counts_as_the_memory_there_is():
    before = there.bound()
    try:
        assert there.bound_to(200_000_000)
        assert there.available_bytes() <= 200_000_000
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(900_000_000, dtype=torch.uint8)
    finally:
        there.set_bound(before)
    assert torch.empty(900_000_000, dtype=torch.uint8).numel() == 900_000_000


def test_the_bound_of_a_command_ends_with_it():
    from finegraft.core.process import bounded_memory

    before = there.bound()
    with bounded_memory() as bounded:
        assert bounded == (not torch.cuda.is_available())
        assert there.bound() != before or not bounded
    assert there.bound() == before
