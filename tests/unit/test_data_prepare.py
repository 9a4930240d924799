"""Labels, cutting, counting."""

from __future__ import annotations

import time

import pytest
from test_data_tiny import SMOLLM2, assistant, tiny, user

from finegraft.core.errors import ConfigError, DataError
from finegraft.data import prepare as module
from finegraft.data.prepare import IGNORE, prepare

PAIR = [user("hello"), assistant("world")]  # 12 tokens of chatml, the answer at 9 and 10
LONG = [user("hello"), assistant("world" + " world" * 20)]  # 32 tokens


def test_labels_are_the_ids_where_learnt() -> None:
    out = prepare([PAIR], tiny(), max_length=64)
    (ids,), (labels,) = out.input_ids, out.labels
    assert labels == [IGNORE] * 9 + ids[9:11] + [IGNORE]
    assert labels[10] == tiny().eos_token_id, "EOS equals pad and is learnt all the same"
    assert (out.counts.rows, out.counts.tokens, out.counts.trained_tokens) == (1, 12, 2)
    assert (out.counts.truncated, out.counts.dropped, out.warnings) == (0, 0, [])


def test_first_token_has_no_label() -> None:
    out = prepare([PAIR], tiny(), max_length=64, completion_only=False)
    assert out.labels[0] == [IGNORE, *out.input_ids[0][1:]]


def test_long_rows_are_cut_and_counted() -> None:
    out = prepare([PAIR, LONG, PAIR], tiny(), max_length=16)
    assert [len(ids) for ids in out.input_ids] == [12, 16, 12]
    assert out.counts.truncated == 1 and out.counts.dropped == 0
    assert out.warnings == [
        "1 of 3 rows was longer than 16 tokens and was cut; the longest has 32: set max_length=32"
    ]
    assert prepare([PAIR, LONG, PAIR], tiny(), max_length=32).warnings == []


def test_keep_end_cuts_the_start() -> None:
    full = prepare([LONG], tiny(), max_length=64)
    cut = prepare([LONG], tiny(), max_length=10, truncation="keep_end")
    assert cut.input_ids[0] == full.input_ids[0][-10:]
    assert cut.labels[0][1:] == full.labels[0][-9:]


def test_rows_whose_answer_is_cut_off_are_dropped() -> None:
    far = [user("hello" + " hello" * 20), assistant("world")]
    out = prepare([PAIR, far, far], tiny(), max_length=16)
    assert out.counts.rows == 1 and out.counts.dropped == 2 and out.counts.truncated == 2
    assert out.warnings[1].startswith("2 of 3 rows were left out")


def test_nothing_left() -> None:
    with pytest.raises(DataError, match=r"FG-DATA-009.*within 6 tokens(.|\n)*max_length=12"):
        prepare([PAIR], tiny(), max_length=6)
    with pytest.raises(DataError, match=r"FG-DATA-009.*holds an answer"):
        prepare([[user("hello")]], tiny(), max_length=64, completion_only=True)
    with pytest.raises(DataError, match="FG-DATA-009"):
        prepare([], tiny(), max_length=64)


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"FG-DATA-013.*max_length is 1"):
        prepare([PAIR], tiny(), max_length=1)
    with pytest.raises(ConfigError, match=r"FG-DATA-013.*'middle'(.|\n)*keep_start, keep_end"):
        prepare([PAIR], tiny(), max_length=9, truncation="middle")


def test_chunks_change_nothing_but_number_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PAIR, LONG, PAIR, [*PAIR, *PAIR], LONG]
    tools = [None, None, [{"name": "bye"}], None, None]
    template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + SMOLLM2
    whole = prepare(rows, tiny(template), max_length=99, tools=tools)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 2)
    assert prepare(rows, tiny(template), max_length=99, tools=tools) == whole
    assert len(whole.input_ids[2]) == len(whole.input_ids[0]) + 1
    with pytest.raises(DataError, match="row 4: "):
        prepare([*rows[:3], []], tiny(), max_length=99)


def test_speed() -> None:
    tokenizer = tiny(SMOLLM2)
    rows = [[user(f"hello {n}"), assistant("world")] for n in range(2000)]
    start = time.perf_counter()
    prepare(rows, tokenizer, max_length=64)
    assert time.perf_counter() - start < 2.0  # 0.3 s measured on one core
