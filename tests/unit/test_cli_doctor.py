"""The doctor names what is wrong with a cure, tells no secret, and is broken only when it is."""

from __future__ import annotations

import http.server
import json
import threading
from importlib import metadata

import pytest
from typer.testing import CliRunner

from finegraft.cli import doctor, doctor_checks
from finegraft.cli.main import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "MATMUL_SECONDS", 0.01)
    monkeypatch.setattr(doctor_checks, "COPY_SECONDS", 0.01)
    monkeypatch.setattr(doctor_checks, "HUB_SECONDS", 0.3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def report(status=0):
    done = runner.invoke(app, ["doctor", "--json"])
    assert done.exit_code == status, done.output
    values = json.loads(done.stdout)
    return values, {finding["name"]: finding for finding in values["findings"]}


def test_a_report_has_facts_rates_and_versions():
    values, found = report()
    assert values["ok"] is True
    assert values["gflops"]["float32"] > 0 and values["gflops"]["bfloat16"] > 0
    assert values["gflops"]["float16"] > 0 and values["copy_bytes_per_second"] > 1e6
    names = {"python", "processor", "memory", "gpu", "default dtype", "cache", "hub token", "torch"}
    names |= {"threads", "hub", "hub cache", "disk", "memory speed", "vllm", "xllamacpp"}
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

    monkeypatch.setattr(metadata, "version", version)


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
    monkeypatch.setattr(doctor_checks, "LOW_DISK_BYTES", float("inf"))
    monkeypatch.setattr(doctor_checks, "LOW_MEMORY_BYTES", float("inf"))
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
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("Look at: ") and "peft" in last


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def mirror():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def hub_at(monkeypatch, endpoint, **more):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for name, value in more.items():
        monkeypatch.setattr(constants, name, value)
    (found,) = doctor_checks.hub()
    return found


def test_a_mirror_that_answers_is_reachable(monkeypatch, mirror):
    found = hub_at(monkeypatch, f"http://127.0.0.1:{mirror.server_port}")
    assert found.status == "ok" and "answers" in found.value
    assert mirror.asked == ["/"]


def test_no_network_is_no_error_and_a_wrong_mirror_is_a_warning(monkeypatch, mirror):
    mirror.shutdown()
    mirror.server_close()
    nowhere = f"http://127.0.0.1:{mirror.server_port}"
    found = hub_at(monkeypatch, nowhere)
    assert found.status == "ok" and "not reachable" in found.value and "refused" in found.value
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    found = hub_at(monkeypatch, nowhere)
    assert found.status == "warn" and "HF_ENDPOINT" in found.cure


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch):
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        found = hub_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 2
    assert "not reachable" in found.value


def test_a_name_that_takes_long_to_look_up_is_not_waited_for(monkeypatch):
    """Name servers that do not answer block for many seconds, whatever timeout is asked for."""
    import socket
    import time

    real = socket.getaddrinfo

    def slow(*words, **more):
        time.sleep(3)
        return real(*words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    found = hub_at(monkeypatch, "http://hub.invalid")
    assert time.monotonic() - start < 2
    assert "no answer in 0.3 s" in found.value


def test_the_hub_is_not_asked_when_it_is_switched_off(monkeypatch, mirror):
    found = hub_at(monkeypatch, f"http://127.0.0.1:{mirror.server_port}", HF_HUB_OFFLINE=True)
    assert "HF_HUB_OFFLINE" in found.value and mirror.asked == []


def test_the_limit_of_a_container_is_told(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1500000000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(doctor_checks, "GROUPS", tmp_path)
    found = {one.name: one for one in doctor_checks.memory()}
    assert "1.5 GB" in found["memory limit"].value
    import torch

    torch.set_num_threads(2)
    (one,) = doctor_checks.threads()
    assert one.status == "warn" and "OMP_NUM_THREADS=1" in one.cure
    (tmp_path / "memory.max").write_text("max\n")
    assert "memory limit" not in {one.name for one in doctor_checks.memory()}


def test_too_few_threads_are_a_warning(monkeypatch, tmp_path):
    from finegraft.core import hardware

    monkeypatch.setattr(doctor_checks, "GROUPS", tmp_path)
    real = hardware.facts()
    monkeypatch.setattr(hardware, "facts", lambda: type(real)(**{**vars(real), "cores": 8}))
    (one,) = doctor_checks.threads()
    assert one.status == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (one,) = doctor_checks.threads()
    assert one.status == "warn" and "unset" in one.cure


def test_the_size_of_the_cache_is_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "finegraft" / "models").mkdir(parents=True)
    (tmp_path / "finegraft" / "models" / "weights").write_bytes(bytes(3_000_000))
    found = {one.name: one for one in doctor_checks.storage()}
    assert "3.0 MB" in found["cache"].value and str(tmp_path) in found["cache"].value


def test_optional_libraries_say_what_they_are_for(monkeypatch):
    versions(monkeypatch, xllamacpp=None, sacrebleu="99.0")
    found = {one.name: one for one in doctor_checks.engines()}
    assert found["xllamacpp"].status == "ok"
    assert "pip install 'finegraft[serve]'" in found["xllamacpp"].value
    assert found["sacrebleu"].status == "warn" and "outside" in found["sacrebleu"].value


def test_vllm_beside_this_environment_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: str(tmp_path / name))
    found = {one.name: one for one in doctor_checks.engines()}
    assert f"--vllm-python {tmp_path / 'python'}" in found["vllm"].value
