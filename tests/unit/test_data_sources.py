"""Files of rows: what is read, and what each broken file says."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from finegraft.core.errors import DataError
from finegraft.data.sources import fingerprint, read_rows

ROWS = [{"prompt": "a, b", "completion": "é\nx"}, {"prompt": "c", "completion": "d"}]
JSONL = '{"prompt": "a, b", "completion": "é\\nx"}\n\n{"prompt": "c", "completion": "d"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.NDJSON", "\ufeff" + JSONL),
        ("a.json", "[" + JSONL.strip().replace("\n\n", ",") + "]"),
        ("b.json", '{"version": 1, "data": [' + JSONL.strip().replace("\n\n", ",") + "]}"),
        ("a.csv", 'prompt,completion\n"a, b","é\nx"\n\nc,d\n'),
        ("a.tsv", 'prompt\tcompletion\na, b\t"é\nx"\nc\td\n'),
    ],
)
def test_each_type_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_rows(str(path)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_rows(path) == ROWS


def test_text_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  \n two \n")
    assert read_rows(path) == [{"text": "one"}, {"text": " two "}]


def test_long_cells_are_read_and_the_modules_limit_is_left_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_missing_file_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"FG-DATA-001.*trian.jsonl(.|\n)*did you mean .*train.js"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="FG-DATA-001"):
        read_rows(tmp_path / "no" / "folder.jsonl")
    with pytest.raises(DataError, match=r"FG-DATA-001.*is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="FG-DATA-001"):
        fingerprint(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n"), ("a.json", ""), ("b.json", "[]"), ("a.csv", "a,b\n"), ("a.txt", "")],
)
def test_no_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="FG-DATA-002"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": oops}\n', r"line 3: not JSON .*\{\"a\": oops\}"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: JSON, but list"),
        ("a.jsonl", b'{"a": "' + b"x" * 500 + b"\n", r"x{50}\.\.\."),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', "line 3: not JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"line 2: not JSON(.|\n)*name the file .jsonl"),
        ("a.json", b'{"a": [1], "b": [2]}', r"2 lists \(a, b\)"),
        ("a.json", b"3", "int, not a list"),
        ("a.json", b"[1]", "item 1 is int"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the header has 2"),
        ("a.csv", b'a,b\n"1"x,2\n', "line 2"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("a.parquet", b"nonsense", "not a parquet file"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"FG-DATA-003.*" + said):
        read_rows(tmp_path / name)


def test_unknown_type_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"FG-DATA-004.*\.xlsx(.|\n)*\.csv, \.json, \.jsonl"):
        read_rows(tmp_path / "a.xlsx")


def test_fingerprint_is_the_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"rows" * 100_000)
    assert fingerprint(tmp_path / "a") == hashlib.sha256(b"rows" * 100_000).hexdigest()
