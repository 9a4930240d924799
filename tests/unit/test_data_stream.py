"""Streams of rows: every row once a pass, the same from any place, and what cannot be read."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from finegraft.core.errors import DataError
from finegraft.data import sources, stream
from finegraft.data.stream_files import Lines, fingerprint, read_lines

ROWS = [{"prompt": f"q{i} " + "x" * (i % 37), "completion": f"ä{i}"} for i in range(500)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks, windows and pieces so small that 500 rows fill many of each."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 700)
    monkeypatch.setattr(stream, "PIECE_ROWS", 16)
    monkeypatch.setattr(stream, "WINDOW_BLOCKS", 4)
    monkeypatch.setattr(stream, "LANES", 2)


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def write_csv(path, rows=ROWS):
    with open(path, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_gz(path, rows=ROWS):
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in rows)


def write_parquet(path, rows=ROWS):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=40)


WRITERS = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".jsonl.gz": write_gz,
    ".parquet": write_parquet,
}


def one_pass(plan, seed=1, start=None, takes=None, epoch=0):
    """Pieces of one pass."""
    found = stream.pieces(plan, seed, start, takes)
    return list(itertools.takewhile(lambda piece: piece[0].epoch == epoch, found))


def prompts(pieces):
    return [row.row["prompt"] for _, rows in pieces for row in rows]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pass_has_every_row_once_in_another_order_each_time(tmp_path, kind):
    for name in ("a", "b", "c"):
        rows = [{**r, "prompt": f"{name} {r['prompt']}"} for r in ROWS]
        WRITERS[kind](tmp_path / f"{name}{kind}", rows)
    plan = stream.lay_out(str(tmp_path / f"*{kind}"))
    first = one_pass(plan)
    expected = sorted(f"{name} {r['prompt']}" for name in "abc" for r in ROWS)
    assert sorted(prompts(first)) == expected
    assert all(len(rows) <= 16 for _, rows in first)
    again = one_pass(plan, start=stream.Cursor(1), epoch=1)
    assert sorted(prompts(again)) == expected and prompts(again) != prompts(first)
    if kind in (".jsonl", ".parquet"):  # other blocks, not only another order of their rows
        assert {*prompts(again[:3])} != {*prompts(first[:3])}
    assert prompts(one_pass(plan)) == prompts(first) != prompts(one_pass(plan, seed=2))
    # not file after file: the first tenth holds rows of at least two of the three
    assert len({text[0] for text in prompts(first)[:150]}) > 1


@pytest.mark.parametrize("kind", WRITERS)
def test_any_cursor_goes_on_with_the_rows_that_followed(tmp_path, kind):
    for name in ("a", "b", "c"):
        WRITERS[kind](tmp_path / f"{name}{kind}")
    plan = stream.lay_out(str(tmp_path / f"*{kind}"))
    whole = list(itertools.islice(stream.pieces(plan, 5), 130))  # more than a pass
    assert whole[-1][0].epoch == 1
    for place in (0, 1, 17, 50, 93, 99, 110):
        kept = json.loads(json.dumps(whole[place][0].as_list()))
        on = stream.pieces(plan, 5, stream.Cursor.of(kept))
        assert list(itertools.islice(on, 10)) == whole[place : place + 10]


def test_blocks_of_lines_have_each_line_once_wherever_they_are_cut(tmp_path):
    path = tmp_path / "rows.txt"
    lines = ["", "a", "bb" * 9, "", "c" * 40, "däü", "e"]
    for end in ("\n", "\r\n", ""):
        body = "\ufeff" + (end or "\n").join(lines) + end
        path.write_bytes(body.encode())
        size = path.stat().st_size
        for step in (1, 2, 3, 7, 16, 200):
            blocks = [Lines(at, min(at + step, size)) for at in range(0, size, step)]
            found = [row["text"] for block in blocks for _, row in read_lines(path, block)]
            assert found == [line for line in lines if line], (end, step)


def test_a_place_names_the_byte_where_the_line_begins(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path)
    raw = path.read_bytes()
    for place, row in read_lines(path, Lines(1000, 2000)):
        at = int(place.split()[1].replace(",", ""))
        assert json.loads(raw[at:].split(b"\n")[0]) == row


def test_lines_that_are_no_rows_are_named_and_the_others_stay(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS[:5])
    with open(path, "ab") as out:
        out.write(b'{"prompt": \n["a"]\n\xff\xfe\xff\n')
    rows = [row for _, rows in one_pass(stream.lay_out(path)) for row in rows]
    wrong = sorted(row.wrong for row in rows if row.row is None)
    assert [words[:8] for words in wrong] == ["list and", "not JSON", "not UTF-"]
    assert sum(row.row is not None for row in rows) == 5
    assert all(row.name.startswith(f"{path}, byte ") for row in rows)


def test_weights_repeat_rows_and_take_the_same_share_in_every_pass(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    write_csv(tmp_path / "b.csv", [{**r, "prompt": "b " + r["prompt"]} for r in ROWS])
    spec = [f"{tmp_path / 'a.jsonl'}=2.5", f"{tmp_path / 'b.csv'}=0.5"]
    plan = stream.lay_out(spec)
    counts = Counter(prompts(one_pass(plan)))
    a = [counts[r["prompt"]] for r in ROWS]
    b = [counts["b " + r["prompt"]] for r in ROWS]
    assert set(a) == {2, 3} and 200 < a.count(3) < 300
    assert set(b) == {0, 1} and 200 < sum(b) < 300
    assert Counter(prompts(one_pass(plan, start=stream.Cursor(1), epoch=1))) == counts


def test_maps_rename_and_a_row_without_the_column_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"q": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    plan = stream.lay_out({"path": str(path), "map": {"prompt": "q"}})
    rows = [row for _, rows in one_pass(plan) for row in rows]
    assert [row.row for row in rows if row.row] == [{"prompt": "a", "completion": "b"}]
    assert "no column 'q'" in next(row.wrong for row in rows if row.row is None)


def test_held_out_rows_are_a_share_by_content(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS + ROWS[:50])
    write_parquet(tmp_path / "b.parquet")
    held = [r for r in ROWS if stream.is_held_out(r, 0.2)]
    assert 60 < len(held) < 140
    assert not any(stream.is_held_out(r, 0.0) for r in ROWS)
    for name in ("a.jsonl", "b.parquet"):
        plan = stream.lay_out(tmp_path / name)
        kept = one_pass(plan, takes=lambda row: not stream.is_held_out(row, 0.2))
        assert {r["prompt"] for r in held}.isdisjoint(prompts(kept))
        assert len({*prompts(kept)}) == len(ROWS) - len(held)


def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    plan = stream.lay_out(tmp_path / "empty.jsonl")
    assert list(stream.pieces(plan, 0)) == []
    with pytest.raises(DataError, match="FG-DATA-002"):
        stream.first_row(plan, 0)
    with pytest.raises(DataError, match="FG-DATA-001"):
        stream.lay_out(tmp_path / "missing.jsonl")
    (tmp_path / "rows.doc").write_text("x")
    with pytest.raises(DataError, match="FG-DATA-004"):
        stream.lay_out(tmp_path / "rows.doc")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert len(prompts(one_pass(stream.lay_out(tmp_path / "rows.json")))) == 500
    monkeypatch.setattr("finegraft.data.stream_files._DOCUMENT_BYTES", 1000)
    with pytest.raises(DataError, match=r"FG-STREAM-004.*one document"):
        stream.lay_out(tmp_path / "rows.json")


def test_patterns_on_other_file_systems(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("b", "a"):
        write_jsonl(tmp_path / "rows", [{**r, "prompt": name + r["prompt"]} for r in ROWS[:50]])
        system.pipe(f"/bucket/{name}.jsonl", (tmp_path / "rows").read_bytes())
    write_gz(tmp_path / "rows.gz", ROWS[:20])
    system.pipe("/bucket/c.jsonl.gz", (tmp_path / "rows.gz").read_bytes())
    write_parquet(tmp_path / "rows.parquet", ROWS[100:200])
    system.pipe("/bucket/d.parquet", (tmp_path / "rows.parquet").read_bytes())
    plan = stream.lay_out("memory://bucket/*")
    assert [str(file.path) for file in plan.files] == [
        f"memory:///bucket/{name}" for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.parquet")
    ]
    expected = [n + r["prompt"] for n in "ab" for r in ROWS[:50]]
    expected += [r["prompt"] for r in ROWS[:20] + ROWS[100:200]]
    assert sorted(prompts(one_pass(plan))) == sorted(expected)
    read = sources.read_rows("memory://bucket/*")  # without streaming
    assert sorted(row["prompt"] for row in read) == sorted(expected)
    with pytest.raises(DataError, match=r"FG-STREAM-002.*no file fits"):
        stream.lay_out("memory://bucket/*.csv")


def test_the_fingerprint_sees_size_time_and_stretches_and_no_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 3_000_000)
    os.utime(path, ns=(1, 10**18))
    first = fingerprint([path])
    path.rename(tmp_path / "other.jsonl")
    path = tmp_path / "other.jsonl"
    assert fingerprint([path]) == first == sources.fingerprint_streamed(path)
    raw = bytearray(path.read_bytes())
    for at in (0, 1_000, len(raw) - 1):
        raw[at] ^= 1
        path.write_bytes(raw)
        os.utime(path, ns=(1, 10**18))
        assert fingerprint([path]) != first
        raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(1, 2 * 10**18))
    assert fingerprint([path]) != first
    path.write_bytes(raw + b"a")
    os.utime(path, ns=(1, 10**18))
    assert fingerprint([path]) != first
