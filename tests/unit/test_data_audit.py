"""The audit finds every planted fault and nothing in clean rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_data_tiny import tiny

import planter
from finegraft.core.errors import DataError
from finegraft.data.audit import CHECKS, audit
from finegraft.data.audit.checks import personal
from finegraft.data.audit.minhash import Sketches, candidates, jaccard


def found(report):
    return {finding.check.code: finding.rows for finding in report.findings}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    lines, held, truth = planter.planted()
    folder = tmp_path_factory.mktemp("planted")
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "held.jsonl").write_text("\n".join(held) + "\n", encoding="utf-8")
    return folder, truth


def test_every_planted_fault_is_found_and_nothing_else(planted):
    folder, truth = planted
    report = audit(str(folder / "rows.jsonl"), held_out=str(folder / "held.jsonl"))
    assert len(truth) >= 40
    assert report.rows == 2000
    assert found(report) == truth
    assert report.verdict == "do not train"


def test_two_processes_find_what_one_finds(planted):
    folder, truth = planted
    report = audit(str(folder / "rows.jsonl"), held_out=str(folder / "held.jsonl"), processes=2)
    assert found(report) == truth


@pytest.mark.parametrize("rows", [planter.clean, planter.foreign])
@pytest.mark.parametrize("seed", [1, 11])
def test_clean_rows_are_clean(rows, seed):
    report = audit(rows(2000, seed))
    assert found(report) == {}
    assert report.verdict == "good"
    assert report.clean_rows == 2000


def test_a_check_that_is_switched_off_would_be_missed(planted, monkeypatch):
    folder, _ = planted
    monkeypatch.setattr(personal, "luhn", lambda text: False)
    assert "FG-CHECK-053" not in found(audit(str(folder / "rows.jsonl")))


def test_labels():
    rows = [
        {"text": row["messages"][-1]["content"] + f" {i}", "label": ("good", "bad", "plain")[i % 3]}
        for i, row in enumerate(planter.clean(600, 4))
    ]
    assert found(audit(rows)) == {}
    rows[7]["label"] = rows[11]["label"] = "plian"
    rows[20]["label"] = "Good "
    rows[31]["label"] = ""
    rows[32]["label"] = None
    rows[40]["text"] = rows[44]["text"]
    for i in range(100, 106):
        rows[i]["label"] = "seldom seen"
    assert found(audit(rows)) == {
        "FG-CHECK-003": [32],
        "FG-CHECK-005": [33],
        "FG-CHECK-022": [41, 45],
        "FG-CHECK-090": [8, 12],
        "FG-CHECK-091": [21],
        "FG-CHECK-092": list(range(101, 107)),
    }


def test_labels_that_say_nothing():
    rows = [{"text": planter.prose(planter.random.Random(i), 2), "label": "a"} for i in range(60)]
    assert found(audit(rows)) == {"FG-CHECK-094": []}
    rows[3]["label"] = "b"
    assert found(audit(rows)) == {"FG-CHECK-092": [4], "FG-CHECK-093": []}


@pytest.mark.parametrize(("count", "severity"), [(8, "error"), (20, "warning"), (50, None)])
def test_too_few_rows(count, severity):
    report = audit(planter.clean(count))
    assert [f.check.severity for f in report.findings] == ([severity] if severity else [])


def test_tokens():
    rows = [{"prompt": "hello world", "completion": "bye now"} for _ in range(60)]
    for i, row in enumerate(rows):
        row["completion"] += " now" * i
    rows[3]["completion"] = "world " * 150
    rows[5] = {"prompt": "hello " * 300, "completion": "bye"}
    tokenizer = tiny()
    report = audit(rows, tokenizer=tokenizer, max_length=120, near=False)
    hits = {code: rows for code, rows in found(report).items() if code >= "FG-CHECK-100"}
    assert hits == {"FG-CHECK-100": [4], "FG-CHECK-101": [6]}
    whole = audit(rows, tokenizer=tokenizer, max_length=report.tokens.needed, near=False)
    assert not {c for c in found(whole) if c >= "FG-CHECK-100"}
    assert whole.trained_tokens == sum(whole.tokens.trained)
    # a row of answer tokens: its words and the end of the turn
    assert whole.tokens.trained[0] == 3


def test_a_template_without_end_is_told():
    tokenizer = tiny("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    tokenizer.eos_token = None
    rows = [{"prompt": f"hello {i}", "completion": "bye now"} for i in range(60)]
    report = audit(rows, tokenizer=tokenizer, near=False)
    assert found(report)["FG-CHECK-102"] == list(range(1, 61))


def test_many_rows_are_sampled_and_it_says_so():
    rows = [{"prompt": f"hello {i}", "completion": "bye now"} for i in range(500)]
    every = audit(rows, tokenizer=tiny(), near=False)
    part = audit(rows, tokenizer=tiny(), near=False, token_rows=50)
    assert part.tokens.sampled and part.tokens.measured == 50
    assert part.trained_tokens == every.trained_tokens
    assert part.as_dict()["tokens"]["sampled"]


def test_rendered_texts_are_left_alone():
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    rows = [
        {"text": text.format(*(m["content"] for m in row["messages"][-2:]))}
        for row in planter.clean(200)
    ]
    assert "FG-CHECK-070" not in found(audit(rows))


def test_numbers_tell_rows_apart():
    long = (
        "The order of the narrow lantern was paid in full and sent to the shop near the old bridge"
    )
    rows = planter.clean(60) + [
        {
            "messages": [
                {"role": "user", "content": f"Order {n}?"},
                {"role": "assistant", "content": f"{long}, number {n}."},
            ]
        }
        for n in (4711, 4712)
    ]
    assert found(audit(rows)) == {}


_WORDS = ["ab", "cd", "ef", "gh", "é", "日", "7", "x_", "."]
_KEYS = ["role", "content", "from", "value", "a"]
_COLUMNS = ["messages", "conversations", "prompt", "text", "instruction"]
_TEXT = st.lists(st.sampled_from(_WORDS), max_size=40).map(" ".join)


@given(st.lists(_TEXT, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_groups_of_words_do_not_depend_on_neighbours(texts):
    together = Sketches()
    groups, owner, numbers = together.shingles(texts)
    for i, text in enumerate(texts):
        alone, _, number = Sketches().shingles([text])
        assert list(groups[owner == i]) == list(alone)
        assert numbers[i] == number[0]


def test_candidates_hold_all_close_pairs():
    dice = planter.random.Random(8)
    texts = [planter.prose(dice, 8) for _ in range(300)]
    texts += [text.replace(" the ", " a ", 1) for text in texts[:100]]
    sketches = Sketches()
    keys, enough = sketches.bands(texts)
    assert enough.all()
    pairs = {tuple(pair) for pair in candidates(keys).tolist()}
    groups, owner, _ = sketches.shingles(texts)
    sets = [planter_unique(groups[owner == i]) for i in range(len(texts))]
    close = {
        (a, b)
        for a in range(len(texts))
        for b in range(a + 1, len(texts))
        if jaccard(sets[a], sets[b]) >= 0.8
    }
    assert len(close) >= 60
    assert close <= pairs


def planter_unique(groups):
    import numpy

    return numpy.unique(groups)


def test_checks_explain_themselves():
    assert list(CHECKS) == sorted(CHECKS)
    for code, check in CHECKS.items():
        assert code.startswith("FG-CHECK-") and len(code) == 12
        assert check.cause.endswith(".") or "http" in check.cause
        assert check.cure.endswith(".") and check.example


def test_no_row_at_all_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("not json\n[1]\n", encoding="utf-8")
    with pytest.raises(DataError, match="FG-DATA-002"):
        audit(str(path))


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(_ANYTHING, max_size=8), st.sampled_from(_COLUMNS))
@settings(max_examples=50, deadline=None)
def test_no_row_breaks_it(values, name):
    good = {
        "messages": {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        },
        "conversations": {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        },
        "prompt": {"prompt": "a", "completion": "b"},
        "text": {"text": "a"},
        "instruction": {"instruction": "a", "output": "b"},
    }[name]
    rows = [good] * 9 + [{**good, name: value} for value in values]
    json.dumps(audit(rows).as_dict())


@pytest.mark.parametrize("seed", range(6))
def test_fuzzed_lines_do_not_break_it(tmp_path, seed):
    path = tmp_path / "rows.jsonl"
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as out:
        out.writelines(line + "\n" for line in planter.fuzzed_lines(500, seed))
    report = audit(str(path))
    assert report.rows == 500
    json.dumps(report.as_dict())
