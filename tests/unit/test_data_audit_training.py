"""Training looks at its rows with the same checks, tells what it found and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import planter
from finegraft.core.errors import DataError
from finegraft.core.schema import build
from finegraft.training import data_check
from finegraft.training.events import EventLog
from finegraft.training.tasks import TASKS


@pytest.fixture
def path(tmp_path):
    rows = planter.clean(60)
    rows[4] = rows[3]
    rows[9]["messages"][-1]["content"] += " Write to lena.fischer@fischer-optik.de today."
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def checked(path, **more):
    told = []
    config = build({"model": "demo", "data": str(path), **more})
    found = TASKS.get(config.task).check(config, EventLog(told.append))
    return found.record, next(event for event in told if event["type"] == "data")


def test_findings_are_told_and_kept(path):
    record, event = checked(path)
    assert record["audit"]["verdict"] == "look at these"
    assert [(f["code"], f["rows"]) for f in record["audit"]["findings"]] == [
        ("FG-CHECK-020", [5]),
        ("FG-CHECK-050", [10]),
    ]
    assert "row 5: the same row once more (FG-CHECK-020)" in event["warnings"]
    json.dumps(record)


def test_it_can_be_turned_off(path):
    record, event = checked(path, data_check=False)
    assert record["audit"] is None
    assert event["warnings"] == []


def test_leaks_of_the_held_out_file(path, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(path.read_text("utf-8").splitlines()[20], encoding="utf-8")
    record, _ = checked(path, eval_data=str(held))
    assert ("FG-CHECK-023", [21]) in [(f["code"], f["rows"]) for f in record["audit"]["findings"]]


def test_half_a_character_stops_it(path):
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]
    }
    path.write_text(path.read_text("utf-8") + "\n" + json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=r"FG-DATA-054.*row 61"):
        checked(path)


def test_near_duplicates_are_left_out_of_many_rows(path, monkeypatch):
    monkeypatch.setattr(data_check, "NEAR_ROWS", 50)
    record, event = checked(path)
    assert record["audit"]["near_duplicates"] is False
    assert event["warnings"][-1] == "near duplicates were not looked for above 50 rows"


def test_classification(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"{row['messages'][-1]['content']} {i}", "label": ("good", "bad")[i % 2]}
        for i, row in enumerate(planter.clean(80))
    ]
    rows[7]["text"] += " Marks &amp; Spencer"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    record, event = checked(path, task="classification", model="demo-encoder", max_length=512)
    assert [(f["code"], f["rows"]) for f in record["audit"]["findings"]] == [("FG-CHECK-064", [8])]
    assert "row 8: an HTML entity (FG-CHECK-064)" in event["warnings"]
