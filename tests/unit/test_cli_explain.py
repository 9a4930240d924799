"""Every code can be explained, and the examples that can be run give the code they explain."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core import explanations

runner = CliRunner()
TEXTS = explanations.texts()
RUN = {code: text["example"] for code, text in TEXTS.items() if text["example"].startswith("$ ")}


def test_every_code_has_cause_cure_and_example():
    for code in explanations.codes():
        one = explanations.explain(code)
        assert one.title and one.cause and one.cure and one.example, code
        assert one.part != code.split("-")[1], f"docs/make.py has no PARTS for {code}"


def test_texts_are_of_codes_that_exist_and_are_whole():
    assert set(TEXTS) <= set(explanations.codes())
    assert len(TEXTS) >= 40
    for code, text in TEXTS.items():
        assert set(text) == {"title", "cause", "cure", "example"}, code
        assert text["title"].endswith("."), code


def test_at_least_twenty_examples_are_run():
    assert len(RUN) >= 20


@pytest.mark.parametrize("code", RUN)
def test_an_example_ends_with_its_code(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *before, last = [line.removeprefix("$ ") for line in RUN[code].splitlines()]
    for line in before:
        subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    words = shlex.split(last)
    assert words[0] == "finegraft"
    done = runner.invoke(app, words[1:])
    assert done.exit_code == 2, done.output
    assert code in done.stderr


def explained(*words, status=0):
    done = runner.invoke(app, ["explain", *words])
    assert done.exit_code == status, done.output
    return done


@pytest.mark.parametrize("word", ["FG-DATA-007", "fg-data-7", "DATA-007", "data7"])
def test_a_code_may_be_written_shortly(word):
    shown = explained(word).stdout
    assert shown.startswith("FG-DATA-007")
    for part in ("Cause", "Cure", "Example", "Message", "DataError (ValueError)"):
        assert part in shown


def test_a_code_without_a_text_of_its_own_shows_its_messages():
    code = next(c for c in explanations.codes() if c.startswith("FG-KERNEL") and c not in TEXTS)
    place = explanations.explain(code).places[0]
    flat = " ".join(explained(code).stdout.split())
    assert " ".join(place.found.split()) in flat


def test_findings_are_explained_as_well():
    assert "Cure" in explained("FG-CHECK-030").stdout
    assert "Cure" in explained("FG-WATCH-001").stdout


def test_the_list_names_every_code():
    shown = explained().stdout
    assert all(code in shown for code in explanations.codes())
    part = explained("disk").stdout
    assert "FG-DISK-001" in part and "FG-DATA" not in part


def test_json_has_every_field():
    (one,) = json.loads(explained("FG-DISK-001", "--json").stdout)["codes"]
    assert {"code", "part", "title", "cause", "cure", "example", "places"} == set(one)
    assert one["places"][0]["builtin"] == "OSError"


def test_an_unknown_code_has_a_near_one():
    done = explained("FG-DTA-007", status=2)
    assert "FG-CORE-001" in done.stderr and "FG-DATA-007" in done.stderr
    assert "explain lists" in explained("zzz", status=2).stderr
