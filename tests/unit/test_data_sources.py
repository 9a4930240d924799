"""Files of rows: what is read, and what each broken file says."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import datasets
import openpyxl
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from finegraft.core.errors import ConfigError, DataError
from finegraft.data import stdin
from finegraft.data.sources import (
    absolute,
    describe,
    fingerprint,
    iter_located,
    iter_rows,
    parts,
    read_rows,
)

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
    with pytest.raises(DataError, match=r"FG-DATA-001.*is a folder(.|\n)*a pattern: .*/\*.jsonl"):
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
        ("a.feather", b"nonsense", "not an arrow or feather file"),
        ("a.xlsx", b"nonsense", "not a spreadsheet"),
        ("a.csv", b"a,b,a\n1,2,3\n", "line 1: the header names the column 'a' twice"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON .nested too deep"),
        ("a.jsonl.gz", b"nonsense", "damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "damaged"),
        ("a.jsonl.xz", b"nonsense", "damaged"),
        ("a.jsonl.bz2", b"nonsense", "Invalid data stream"),
        ("a.jsonl.zst", b"nonsense", "."),
    ],
)
def test_unreadable(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"FG-DATA-003.*" + said):
        read_rows(tmp_path / name)


def test_unknown_type_lists_the_known(tmp_path: Path) -> None:
    for name, said in (
        ("a.docx", r"\.docx'(.|\n)*\.csv, .*\.json, \.jsonl, .*\.xlsx"),
        ("a.parquet.gz", r"\.parquet\.gz'(.|\n)*\.txt before \.gz"),
        ("rows", "'none'"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"FG-DATA-004.*" + said):
            read_rows(tmp_path / name)


def test_fingerprint_is_the_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"rows" * 100_000)
    assert fingerprint(tmp_path / "a") == hashlib.sha256(b"rows" * 100_000).hexdigest()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_text_files(tmp_path: Path, suffix: str, pack: object) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(JSONL.encode()))  # type: ignore[operator]
    (tmp_path / f"a.csv{suffix}").write_bytes(pack(b"a,b\n1,2\n"))  # type: ignore[operator]
    assert read_rows(tmp_path / f"a.jsonl{suffix}") == ROWS
    assert read_rows(tmp_path / f"a.csv{suffix}") == [{"a": "1", "b": "2"}]


def test_zstandard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with pyarrow.output_stream(str(path), compression="zstd") as out:
        out.write(JSONL.encode())
    assert path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    assert read_rows(path) == ROWS


def test_arrow_files_and_streams_and_feather(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS * 700)
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as out:
        out.write_table(table)
    for name in ("a.feather", "a.arrow", "b.arrow"):
        assert read_rows(tmp_path / name) == ROWS * 700


def test_spreadsheet(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.create_sheet("rows")  # the first sheet stays empty
    for row in (["prompt", "completion", None], [], ["a", 4], [None, None], ["b", None]):
        sheet.append(row)
    book.save(tmp_path / "a.xlsx")
    expected = [{"prompt": "a", "completion": 4}, {"prompt": "b", "completion": None}]
    assert read_rows(tmp_path / "a.xlsx") == expected
    sheet.append(["c", "d", "e"])
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(DataError, match=r"FG-DATA-003.*line 6: a cell to the right"):
        read_rows(tmp_path / "b.xlsx")


def test_what_excel_exports_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt;completion\n1,5;é\n", encoding="utf-8-sig")
    assert read_rows(path) == [{"prompt": "1,5", "completion": "é"}]
    path.write_text("prompt\tcompletion\na\té\n", encoding="utf-16")
    (tmp_path / "a.tsv").write_bytes(path.read_bytes())
    assert read_rows(tmp_path / "a.tsv") == [{"prompt": "a", "completion": "é"}]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(tmp_path / "saved")
    assert read_rows(tmp_path / "saved" / "train") == ROWS
    with pytest.raises(DataError, match=r"FG-DATA-001.*with the splits train(.|\n)*saved/train"):
        read_rows(tmp_path / "saved")


def test_patterns_and_lists_keep_the_origin_of_a_row(tmp_path: Path) -> None:
    for name, count in (("b", 2), ("a", 1)):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n' * count)
    found = list(iter_located(str(tmp_path / "*.jsonl")))
    assert [(Path(at.source).name, at.number) for at in found] == [
        *(("a.jsonl", 1), ("b.jsonl", 1), ("b.jsonl", 2)),
    ]
    listed = [str(tmp_path / "b.jsonl"), {"path": str(tmp_path / "a.jsonl"), "map": {"t": "text"}}]
    assert read_rows(listed) == [{"text": "b"}] * 2 + [{"t": "a"}]
    assert read_rows(listed, {"x": "text"}) == [{"x": "b"}] * 2 + [{"t": "a"}]
    with pytest.raises(DataError, match=r"FG-DATA-001.*/\*.csv"):
        read_rows(str(tmp_path / "*.csv"))
    assert describe(listed) == f"{tmp_path / 'b.jsonl'} and 1 more"


def test_an_empty_file_among_others_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"a": 1}')
    assert read_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == [{"a": 1}]
    assert "a.jsonl holds no rows" in caplog.text


def test_the_first_rows_come_before_the_last_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 3 + "broken\n")
    rows = iter_rows(path)
    assert [next(rows)["a"] for _ in range(3)] == [1, 1, 1]
    with pytest.raises(DataError, match=r"FG-DATA-003.*line 4"):
        next(rows)
    with pytest.raises(DataError, match="FG-DATA-001"):
        iter_rows(tmp_path / "none.jsonl")  # before the first row is asked for


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_no_file_is_held_in_memory(tmp_path: Path, kind: str) -> None:
    count, text = 20_000, "x" * 500
    path = tmp_path / f"a.{kind}"
    table = pyarrow.table({"text": [text] * count})
    if kind == "jsonl":
        path.write_text(json.dumps({"text": text}) + "\n", "utf-8")
        path.write_text(path.read_text() * count)
    elif kind == "csv":
        path.write_text("text\n" + f"{text}\n" * count)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as out:
            out.write_table(table)
    tracemalloc.start()
    assert sum(len(row["text"]) for row in iter_rows(path)) == count * 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6  # bytes; the rows are 10 MB


def test_fingerprint_of_several_files_counts_all_of_them(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}')
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    assert fingerprint([a]) == fingerprint(a)
    assert len({fingerprint(x) for x in ([a, b], [b, a], [a, c], [a, b, c], a)}) == 5
    assert fingerprint([a, b]) == fingerprint(str(tmp_path / "[ab].jsonl"))


def test_weights_and_what_is_no_part(tmp_path: Path) -> None:
    assert [(p.path, p.weight) for p in parts(["a=2", {"path": "b", "weight": 0.5}, "c"])] == [
        *(("a", 2.0), ("b", 0.5), ("c", 1.0)),
    ]
    (tmp_path / "x=3").write_text("")
    assert parts(str(tmp_path / "x=3"))[0].weight == 1.0, "a file of that name comes first"
    for spec, said in (
        ([], "empty list"),
        ([3], "holds int: 3"),
        ([{"path": "a", "wieght": 2}], "'wieght'(.|\n)*did you mean 'weight'"),
        ([{"weight": 2}], "has no path"),
        ([{"path": "a", "weight": 0}], "weight of a is 0"),
        ([{"path": "a", "weight": True}], "weight of a is True"),
        ([{"path": "a", "map": "b"}], "map of a is 'b'"),
    ):
        with pytest.raises(ConfigError, match=f"FG-DATA-030: .*{said}"):
            parts(spec)


def test_whole_paths_keep_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a.jsonl") == str(tmp_path / "a.jsonl")
    assert absolute(["a.jsonl=2", "hf:me/rows"]) == [f"{tmp_path / 'a.jsonl'}=2", "hf:me/rows"]
    part = {"path": "a.jsonl", "weight": 2, "map": {"a": "b"}}
    assert absolute([part]) == [{**part, "path": str(tmp_path / "a.jsonl")}]


def test_a_missing_local_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/a", "./a", "tests/none.jsonl", "src/none"):
        with pytest.raises(DataError, match="FG-DATA-001"):
            read_rows(name)


@pytest.fixture
def piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Put bytes on standard input; nothing is remembered from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(content: bytes) -> None:
        stdin.saved.cache_clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    yield put
    stdin.saved.cache_clear()


def test_standard_input_is_kept_for_a_second_reading(tmp_path: Path, piped: object) -> None:
    piped(JSONL.encode())  # type: ignore[operator]
    assert read_rows("-") == ROWS and read_rows("-") == ROWS
    assert fingerprint("-") == hashlib.sha256(JSONL.encode()).hexdigest()
    kept = Path(absolute("-"))
    assert kept.suffix == ".jsonl" and read_rows(kept) == ROWS
    piped(("\ufeff [" + JSONL.strip().replace("\n\n", ",") + "]").encode())  # type: ignore[operator]
    assert read_rows("-") == ROWS
    assert len(list((tmp_path / "cache/finegraft/stdin").iterdir())) == 2, "nothing half-written"


@pytest.mark.parametrize(("content", "said"), [(b" \n", "is empty"), (b"a,b\n1,2\n", "with 'a'")])
def test_standard_input_of_another_type(piped: object, content: bytes, said: str) -> None:
    piped(content)  # type: ignore[operator]
    with pytest.raises(DataError, match=f"FG-DATA-033: standard input .*{said}"):
        read_rows("-")
