"""Several files: layouts side by side, weights, held-out rows, names in messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft.core.errors import ConfigError, DataError
from finegraft.core.schema import build, from_file
from finegraft.data import marked, mix
from finegraft.training import run
from finegraft.training.events import EventLog
from finegraft.training.tasks.causal import check, sides


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"a{i}", "completion": "x"} for i in range(40)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("b.csv").write_text("q,r\n" + "".join(f"b{i},y\n" for i in range(10)))
    return tmp_path


def asked(corpus: mix.Corpus) -> list[str]:
    return [messages[0]["content"] for messages in corpus.conversations]


B = {"path": "b.csv", "map": {"prompt": "q", "completion": "r"}}


def test_one_file_stays_in_its_order(files: Path) -> None:
    corpus = mix.read("a.jsonl")
    assert asked(corpus) == [f"a{i}" for i in range(40)]
    assert corpus.origins is None and set(corpus.copies) == {1}


def test_parts_are_spread_evenly_and_keep_their_order(files: Path) -> None:
    corpus = mix.read(["a.jsonl", B])
    found = asked(corpus)
    assert sorted(found) == sorted([f"a{i}" for i in range(40)] + [f"b{i}" for i in range(10)])
    assert [w for w in found if w[0] == "b"] == [f"b{i}" for i in range(10)]
    for start in range(0, 50, 10):
        assert sum(word[0] == "b" for word in found[start : start + 10]) == 2
    assert corpus.origins is not None
    assert corpus.origins[found.index("b3")] == "b.csv, row 4"


def test_a_map_of_the_whole_is_for_parts_without_one(files: Path) -> None:
    Path("c.csv").write_text("ask,say\nc0,z\n")
    corpus = mix.read(["c.csv", B], {"prompt": "ask", "completion": "say"})
    assert sorted(asked(corpus))[-1] == "c0" and len(corpus) == 11


def test_weights_repeat_rows_after_some_are_held_out(files: Path) -> None:
    corpus = mix.read([{**B, "weight": 2.5}, "a.jsonl=0.5"], seed=1)
    train, held = corpus.hold_out(0.2)
    assert len(held) == 10 and len(set(asked(held))) == 10
    repeated = asked(train.repeated())
    assert not set(repeated) & set(asked(held))
    assert {repeated.count(word) for word in set(asked(train)) if word[0] == "b"} <= {2, 3}
    whole = asked(corpus.repeated())
    assert sum(word[0] == "b" for word in whole) == 25
    assert sum(word[0] == "a" for word in whole) == 20


def test_the_seed_decides_and_nothing_else(files: Path) -> None:
    spec = ["a.jsonl=0.5", B]
    first, again, other = (asked(mix.read(spec, seed=s).repeated()) for s in (1, 1, 2))
    assert first == again != other
    assert len(first) == len(other) == 30


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.floats(0.01, 5), st.integers(0, 9))
def test_a_weight_is_kept_to_the_row(count: int, weight: float, seed: int) -> None:
    import random

    copies = mix._copies(count, weight, random.Random(seed))
    assert len(copies) == count and max(copies) - min(copies) <= 1
    assert abs(sum(copies) - weight * count) <= max(0.5, 1 - weight * count)


def test_what_is_wrong_names_the_file(files: Path) -> None:
    Path("c.jsonl").write_text('{"prompt": "c", "completion": "z"}\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=r"FG-DATA-005: c.jsonl, row 2: the field 'completion'"):
        mix.read(["a.jsonl", "c.jsonl"])
    with pytest.raises(DataError, match=r"FG-DATA-005: row 2: "):
        mix.read("c.jsonl")
    with pytest.raises(DataError, match=r"FG-DATA-007: b.csv: the columns \(q, r\)"):
        mix.read(["a.jsonl", "b.csv"])
    Path("d.jsonl").write_text('{"messages": [{"role": "tool", "content": "x"}]}\n')
    config = build({"model": "demo", "data": ["a.jsonl", "d.jsonl"], "chat_template": "gemma"})
    with pytest.raises(DataError, match=r"FG-DATA-011: d.jsonl, row 1: "):
        check(config, EventLog(None))


def test_training_reads_them_with_a_record_of_all(files: Path) -> None:
    settings_ = {"model": "demo", "data": ["a.jsonl=2", B], "eval_fraction": 0.1}
    config = build(settings_)
    name, train, held = sides(config)
    assert (name, len(train), len(held)) == ("prompt_completion", 36 * 2 + 9, 5)
    record = check(config, EventLog(None)).record
    assert record["path"] == "a.jsonl and 1 more" and record["counts"]["rows"] == 81
    Path("b.csv").write_text("q,r\nb,y\n")
    assert check(config, EventLog(None)).record["fingerprint"] != record["fingerprint"]


def test_the_saved_configuration_reads_from_any_folder(
    files: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build({"model": "demo", "data": ["a.jsonl=2", B], "eval_data": "a.jsonl"})
    before = asked(mix.read(config.data))
    (files / "config.yaml").write_text(run.anywhere(config).to_yaml())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    saved = from_file(files / "config.yaml")
    assert asked(mix.read(saved.data)) == before
    assert len(mix.read(saved.eval_data)) == 40


def test_labelled_files_are_joined_and_take_no_weights(files: Path) -> None:
    for name, label in (("x", "good"), ("y", "bad")):
        Path(f"{name}.csv").write_text(f"text,label\n{name},{label}\n")
    assert [row["label"] for row in mix.read_rows(["x.csv", "y.csv"])] == ["good", "bad"]
    with pytest.raises(ConfigError, match=r"FG-DATA-036: x.csv has the weight 2 with task"):
        mix.read_rows(["x.csv=2", "y.csv"])
    for name in "xy":
        Path(f"{name}.conll").write_text(f"{name}\tO\n\n")
    assert [row["tokens"] for row in marked.read_rows("*.conll")] == [["x"], ["y"]]
    with pytest.raises(ConfigError, match="FG-DATA-036"):
        marked.read_rows("x.conll=2")


@pytest.mark.parametrize("data", [3, [3], [[]]])
def test_the_schema_says_what_data_may_be(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"FG-CONF-001: .*'data' is .*, not: rows: a file"):
        build({"model": "demo", "data": data})
