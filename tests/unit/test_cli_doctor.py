"""The doctor names what is wrong with a cure, tells no secret, and is broken only when it is."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

from finegraft.cli import doctor
from finegraft.cli.main import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "MATMUL_SECONDS", 0.01)


def report(status=0):
    done = runner.invoke(app, ["doctor", "--json"])
    assert done.exit_code == status, done.output
    values = json.loads(done.stdout)
    return values, {finding["name"]: finding for finding in values["findings"]}


def test_a_report_has_facts_rates_and_versions():
    values, found = report()
    assert values["ok"] is True
    assert values["gflops"]["float32"] > 0 and values["gflops"]["bfloat16"] > 0
    names = {"python", "processor", "memory", "gpu", "default dtype", "cache", "hub token", "torch"}
    assert names <= set(found)
    assert metadata.version("torch") in found["torch"]["value"]
    for finding in found.values():
        assert finding["status"] == "ok" or finding["cure"]


def versions(monkeypatch, **changed):
    real = metadata.version

    def version(name):
        if name in changed and changed[name] is None:
            raise metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)


def test_a_version_outside_its_range_is_a_warning(monkeypatch):
    versions(monkeypatch, peft="99.0")
    values, found = report()
    assert values["ok"] is True
    assert found["peft"]["status"] == "warn"
    assert "99.0 (outside" in found["peft"]["value"]
    assert found["peft"]["cure"].startswith("pip install 'peft")


def test_a_missing_library_is_broken(monkeypatch):
    versions(monkeypatch, peft=None)
    values, found = report(status=1)
    assert values["ok"] is False
    assert found["peft"]["status"] == "broken"


def test_without_torch_there_is_still_a_report(monkeypatch):
    versions(monkeypatch, torch=None)
    monkeypatch.setattr(doctor, "hardware", lambda: pytest.fail("torch was asked"))
    _, found = report(status=1)
    assert found["torch"]["status"] == "broken"


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch):
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is built for CUDA here")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    _, found = report()
    assert found["gpu"]["status"] == "warn"
    assert "CPU only" in found["gpu"]["value"]


def test_little_room_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", float("inf"))
    monkeypatch.setattr(doctor, "LOW_MEMORY_BYTES", float("inf"))
    _, found = report()
    assert found["cache"]["status"] == found["memory"]["status"] == "warn"


def test_the_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    done = runner.invoke(app, ["doctor"])
    assert "verysecret" not in done.output
    assert "present" in done.stdout
    monkeypatch.delenv("HF_TOKEN")
    assert "verysecret" not in runner.invoke(app, ["doctor", "--json"]).output


def test_warnings_are_listed_at_the_end(monkeypatch):
    versions(monkeypatch, peft="99.0")
    done = runner.invoke(app, ["doctor"])
    assert done.stdout.rstrip().endswith("Look at: peft")
