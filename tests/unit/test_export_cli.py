"""``finegraft merge``, ``export`` and ``verify`` as they are typed."""

from __future__ import annotations

import json

import pytest
from export_tiny import base, change_weights, write_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.schema import build
from finegraft.training.run import train

runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a real run of three steps."""
    folder = tmp_path_factory.mktemp("cli")
    values = {"model": str(base(folder / "base")), "output": str(folder / "run")}
    values |= {"data": str(write_rows(folder / "rows.jsonl")), "eval_fraction": 0.3}
    values |= {"learning_rate": 0.02, "max_steps": 3, "dtype": "float32"}
    train(build(values, "test"))
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def answer(*words, status=0):
    done = runner.invoke(app, [*words, "--json"])
    assert done.exit_code == status, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def test_merge_and_verify(place):
    found = answer("merge", "run", "--output", "merged")
    assert found["verified"] is True and found["exports"][0]["format"] == "merged_16bit"
    AutoModelForCausalLM.from_pretrained("merged")
    told = answer("verify", "merged")
    assert set(told) >= {"verified", "format", "checks", "cause"}
    assert told["verified"] is True and told["cause"] is None
    assert told["rows"] == "held-out rows of the run"
    assert all(set(c) == {"name", "value", "tolerance", "ok"} for c in told["checks"])
    card = (place / "merged" / "README.md").read_text()
    data = json.loads((place / "run" / "data.json").read_text())
    assert data["fingerprint"] in card and "| `learning_rate` | 0.02 |" in card
    assert "merged_16bit), compared on held-out rows of the run: passed" in card
    assert "held out loss" in card and str(place) not in card


def test_a_fault_gives_status_1_and_its_cause(place):
    answer("merge", "run", "--output", "bad", "--no-verify")
    marked = json.loads((place / "bad" / "verification.json").read_text())
    assert marked["verified"] is False and "not asked" in marked["cause"]
    assert "**not verified**" in (place / "bad" / "README.md").read_text()
    own = AutoModelForCausalLM.from_pretrained("base").state_dict()
    own.pop("lm_head.weight")
    change_weights(place / "bad", lambda _: {n: t.contiguous() for n, t in own.items()})
    told = answer("verify", "bad", "--against", "run", status=1)
    assert told["verified"] is False and "adapter not merged" in told["cause"]
    done = runner.invoke(app, ["verify", "bad"])
    assert done.exit_code == 1
    assert "NOT VERIFIED" in done.stdout and "cause: adapter not merged" in done.stdout


def test_several_formats_get_a_folder_each(place):
    done = runner.invoke(app, ["export", "run", "--to", "lora,merged-16bit", "--output", "both"])
    assert done.exit_code == 0, done.stderr
    assert "Next:" in done.stdout and "finegraft generate both/merged-16bit" in done.stdout
    assert (place / "both" / "lora" / "adapter_config.json").is_file()
    told = answer("verify", "both")
    assert told["verified"] is True and told["format"] == "lora, merged_16bit"


def test_mistakes(place):
    told = answer("export", "run", "--to", "gguff:q8_0", "--output", "x", status=2)["error"]
    assert told["code"] == "FG-CORE-001" and "gguf" in told["fix"]
    told = answer("export", "runs", "--to", "lora", "--output", "x", status=2)["error"]
    assert told["code"].startswith("FG-MODEL")
    told = answer("merge", "run", "--output", "run", status=2)["error"]
    assert told["code"] == "FG-EXPORT-037"
    told = answer("verify", "nothing", status=2)["error"]
    assert told["code"] == "FG-EXPORT-044"
    assert not (place / "x").exists()
