"""``finegraft init``: the settings fit the rows, say why, and train as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.schema import build, from_file
from finegraft.data import propose

runner = CliRunner()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def init(*words: str) -> dict[str, Any]:
    done = runner.invoke(app, ["init", *words, "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


PAIRS = [{"english": f"hello {i}", "translation": "world " * (1 + i % 7)} for i in range(40)]


def test_columns_are_mapped_and_the_file_is_a_configuration() -> None:
    found = init(write("rows.jsonl", PAIRS))
    assert found["task"] == "causal" and found["rows"] == 40
    assert found["map"] == {"prompt": "english", "completion": "translation"}
    config = from_file("settings.yaml")
    assert config.map == found["map"] and config.data == "rows.jsonl"
    assert config.output == "runs/rows" and config.eval_fraction == 0.1
    text = Path("settings.yaml").read_text()
    keys = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in keys), "every key says why"


def test_it_trains_as_it_is() -> None:
    init(write("rows.jsonl", PAIRS))
    done = runner.invoke(app, ["train", "settings.yaml", "--max-steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and Path(result["adapter"]).is_dir()
    assert result["eval_loss"] > 0, "rows were held out"


@pytest.mark.parametrize(
    ("name", "content", "task", "told"),
    [
        (
            "a.csv",
            "sentence,sentiment\n" + "".join(f"it is {i},{'ng'[i % 2]}\n" for i in range(60)),
            "classification",
            "sentence -> sentiment",
        ),
        (
            "b.csv",
            "review,stars\n" + "".join(f"it is {i},{1 + i % 5}\n" for i in range(60)),
            "classification",
            "review -> stars",
        ),
        ("c.conll", "Ada\tB-PER\nwrote\tO\n\n" * 30, "token_classification", "tokens -> tags"),
        (
            "d.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}\n' * 30,
            "causal",
            "messages",
        ),
        ("e.txt", "a line\n" * 30, "causal", "text"),
    ],
)
def test_the_task_is_found(name: str, content: str, task: str, told: str) -> None:
    Path(name).write_text(content)
    found = init(name)
    assert (found["task"], found["format"]) == (task, told)
    assert from_file("settings.yaml").task == task


def test_a_file_is_never_replaced_unasked() -> None:
    rows = write("rows.jsonl", PAIRS)
    Path("settings.yaml").write_text("mine")
    done = runner.invoke(app, ["init", rows, "--json"])
    assert json.loads(done.stdout)["error"]["code"] == "FG-DATA-038" and done.exit_code == 2
    assert Path("settings.yaml").read_text() == "mine"
    init(rows, "--output", "other.yaml")
    init(rows, "--overwrite")
    assert from_file("settings.yaml").data == rows


def test_rows_that_cannot_be_trained_leave_no_file() -> None:
    pairs = write("dpo.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    other = write("odd.jsonl", [{"x1": "a", "x2": 3, "x3": 4}])
    for words, code in (
        ([pairs], "FG-DATA-034"),
        ([other], "FG-DATA-007"),
        (["none.jsonl"], "FG-DATA-001"),
        ([pairs, "--task", "causall"], "FG-DATA-040"),
    ):
        done = runner.invoke(app, ["init", *words, "--json"])
        assert json.loads(done.stdout)["error"]["code"] == code
    assert not Path("settings.yaml").exists()


def test_several_files_with_weights() -> None:
    write("a.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    write("b.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    assert init("a.jsonl=2", "b.jsonl")["rows"] == 60
    assert from_file("settings.yaml").data == ["a.jsonl=2", "b.jsonl"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=300),
    st.integers(1, 10**6),
    st.sampled_from([512, 8192, 1 << 20]),
    st.sampled_from(["causal", "classification", "token_classification"]),
)
def test_any_rows_give_settings_that_the_schema_takes(
    lengths: list[int], more: int, longest: int, task: str
) -> None:
    rows = max(len(lengths), more)
    found = propose.Found(task, "x", {}, rows, [{}] * len(lengths))
    chosen = {one.key: one.value for one in propose.propose(found, sorted(lengths), longest)}
    config = build({"model": "demo", "data": "x.jsonl", "task": task, **chosen})
    assert config.max_length <= longest
    held = round(rows * config.eval_fraction)
    assert held < rows and held <= 1000 and (held or rows < 20)
    assert config.max_length >= min(max(lengths), longest, 2048) - 8
    assert config.per_device_train_batch_size * config.max_length <= max(4096, config.max_length)
    assert yaml.safe_load(config.to_yaml())
