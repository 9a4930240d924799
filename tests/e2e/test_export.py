"""The demo model, trained for a moment, in every format, verified by the libraries that run it."""

from __future__ import annotations

import json

import pytest
from command_line import finegraft
from command_line import write_rows as write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write(folder / "rows.jsonl", 40)
    words = ["--model", "demo", "--data", "rows.jsonl", "--output", "run", "--max-steps", 6]
    words += ["--learning-rate", "2e-3", "--eval-fraction", "0.2"]
    done = finegraft("train", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("to", ["merged-16bit", "lora", "merged-4bit"])
def test_folders(place, to):
    done = finegraft("export", "run", "--to", to, "--output", to, "--json", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["verified"] is True
    said = finegraft("generate", to, "3 and 3?", "--max-new-tokens", 8, "--json", cwd=place)
    assert json.loads(said.stdout)["outputs"][0]["text"]


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_gguf(place, kind):
    pytest.importorskip("xllamacpp", reason="llama.cpp is an extra")
    done = finegraft("export", "run", "--to", f"gguf:{kind}", "--output", kind, "--json", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["verified"] is True


@pytest.mark.parametrize("to", ["gguf-lora", "ollama:adapter"])
def test_adapters_beside_their_base_in_llama_cpp(place, to):
    pytest.importorskip("xllamacpp", reason="llama.cpp is an extra")
    out = to.replace(":", "-")
    done = finegraft("export", "run", "--to", to, "--output", out, "--json", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["verified"] is True
    checks = {check["name"]: check["value"] for check in told["exports"][0]["checks"]}
    assert checks["adapter"] < 0.1 and checks["facts"] == 0


def test_a_base_without_the_adapter_is_found_out(place):
    words = ["--to", "merged-16bit", "--output", "base", "--no-verify"]
    assert finegraft("export", "demo", *words, cwd=place).returncode == 0
    done = finegraft("verify", "base", "--against", "run", "--json", cwd=place)
    assert done.returncode == 1
    assert "adapter not merged" in json.loads(done.stdout)["cause"]
