"""`finegraft data check` as a person and as a script meet it; its page; the copy it cleans."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
import planter
from finegraft.cli.main import app
from finegraft.data.audit import CHECKS, audit

runner = CliRunner()
VOID = {"meta", "link", "br", "img", "input", "hr"}


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def check(*words):
    return runner.invoke(app, ["data", "check", *words])


@pytest.fixture
def planted(tmp_path):
    lines, held, truth = planter.planted(800, each=2)
    return write(tmp_path / "rows.jsonl", lines), write(tmp_path / "held.jsonl", held), truth


def test_good_rows_end_with_zero(tmp_path):
    done = check(write(tmp_path / "rows.jsonl", planter.clean(80)))
    assert done.exit_code == 0, done.output
    assert done.output.startswith("good:")


def test_warnings_end_with_zero_and_errors_with_one(tmp_path):
    rows = planter.clean(80)
    rows[4] = rows[3]
    done = check(write(tmp_path / "rows.jsonl", rows))
    assert done.exit_code == 0 and done.output.startswith("look at these")
    assert "row 5: the same row once more" in done.output
    rows[9]["messages"][-1]["content"] = ""
    done = check(write(tmp_path / "rows.jsonl", rows))
    assert done.exit_code == 1 and done.output.startswith("do not train")


def test_json_has_the_documented_keys(planted):
    rows, held, truth = planted
    done = check(rows, "--eval-data", held, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert {f["code"]: f["rows"] for f in told["findings"]} == truth
    assert {"verdict", "rows", "trained_tokens", "findings"} <= set(told)
    assert {"code", "severity", "rows", "message"} <= set(told["findings"][0])


def test_tokens_of_the_demo_model(tmp_path):
    path = write(tmp_path / "rows.jsonl", planter.clean(60))
    told = json.loads(check(path, "--model", "demo", "--max-length", "64", "--json").stdout)
    assert 0 < told["trained_tokens"] < told["tokens"]["total"]
    assert "FG-CHECK-100" in {f["code"] for f in told["findings"]}
    longer = str(told["tokens"]["needed_max_length"])
    told = json.loads(check(path, "--model", "demo", "--max-length", longer, "--json").stdout)
    assert told["verdict"] == "good"


def test_secrets_are_never_quoted(planted, tmp_path):
    rows, held, _ = planted
    page = tmp_path / "page.html"
    done = check(rows, "--eval-data", held, "--json", "--report", str(page))
    for text in (done.stdout, page.read_text(encoding="utf-8")):
        assert not re.search(r"ghp_\w{10}|hf_\w{10}|s3cr\d+|tr0ub4dor", text)


def test_the_cleaned_copy(planted, tmp_path):
    rows, held, truth = planted
    before = Path(rows).read_bytes()
    out = tmp_path / "clean.jsonl"
    done = check(rows, "--eval-data", held, "--fix", str(out), "--json")
    told = json.loads(done.stdout)["fixed"]
    assert Path(rows).read_bytes() == before
    kept = out.read_text(encoding="utf-8").splitlines()
    changes = [json.loads(x) for x in Path(told["changes"]).read_text("utf-8").splitlines()]
    assert len(kept) == told["kept"] == 800 - told["removed"]
    fixable = {row for code, rows in truth.items() if CHECKS[code].fix for row in rows}
    assert {entry["row"] for entry in changes} == fixable
    for entry in changes:
        expected = {code for code, rows in truth.items() if entry["row"] in rows}
        assert set(entry["codes"]) <= expected and entry["why"]
    again = audit(str(out), held_out=held)
    assert again.verdict == "look at these"
    assert {f.check.code for f in again.findings} == {c for c in truth if not CHECKS[c].fix}


def test_nothing_is_overwritten(planted, tmp_path):
    rows, *_ = planted
    for name, code in (("rows.jsonl", "FG-DATA-051"), ("rows.csv", "FG-DATA-050")):
        done = check(rows, "--fix", str(tmp_path / name), "--json")
        assert done.exit_code == 2
        assert json.loads(done.stdout)["error"]["code"] == code
    done = check(rows, "--report", rows, "--json")
    assert json.loads(done.stdout)["error"]["code"] == "FG-DATA-052"
    done = check(rows, "--task", "vision", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "FG-DATA-053"


class Reader(HTMLParser):
    """Fails on tags that do not close, and notes ids, links and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.fetched = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"][1:]] if given.get("href", "").startswith("#") else []
        self.fetched += [
            v
            for k, v in attrs
            if k in ("src", "href", "action") and not v.startswith(("#", "data:"))
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(planted, tmp_path):
    rows, held, truth = planted
    page = tmp_path / "page.html"
    check(rows, "--eval-data", held, "--model", "demo", "--report", str(page))
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.fetched == []
    assert set(reader.links) <= set(reader.ids) and len(reader.ids) == len(set(reader.ids))
    assert "<script" not in text and "url(" not in text and "@import" not in text
    assert all(code in text for code in truth)
    for chart in ("Tokens of a row", "Trained share of a row", "Languages of the answers"):
        assert chart in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_a_complaint(planted, tmp_path, width):
    rows, held, _ = planted
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    check(rows, "--eval-data", held, "--report", str(page))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={width},900", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shot.stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr
