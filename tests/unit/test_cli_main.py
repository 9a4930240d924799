"""Every command line ends with a status, a message and, with --json, exactly one object."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from finegraft.cli import doctor
from finegraft.cli.main import app
from finegraft.core.errors import DataError

runner = CliRunner()
COMMANDS = ["quickstart", "train", "resume", "ladder", "chat", "generate", "merge", "export"]
COMMANDS += ["verify", "push", "serve", "predict", "eval", "runs", "compare", "report", "doctor"]
COMMANDS += ["explain", "init", "plan", "ui", "sweep"]


def shell(*words, code="from finegraft.cli.main import main; main()", **env):
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={"PATH": "", "COLUMNS": "80", "OMP_NUM_THREADS": "1", "HOME": "/nonexistent", **env},
        check=False,
    )


def failing(monkeypatch, error):
    def fail():
        print("noise of some library")
        raise error

    monkeypatch.setattr(doctor, "system", fail)


def test_help_fits_a_small_screen():
    done = shell("--help")
    lines = done.stdout.rstrip("\n").split("\n")
    assert done.returncode == 0
    assert len(lines) <= 16 + len(COMMANDS)  # one line a command, one for each group
    assert max(map(len, lines)) <= 80
    for name in COMMANDS:
        assert f" {name} " in done.stdout
    assert "completion" not in done.stdout


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "matplotlib")
    code = (
        "import sys, finegraft.cli.main as m\n"
        "try: m.main()\n"
        f"finally: print([x for x in {heavy} if x in sys.modules], file=sys.stderr)"
    )
    assert shell("train", "--help", code=code).stderr.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_whole_flag_names(name):
    done = runner.invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert "…" not in done.stdout


def test_version():
    assert runner.invoke(app, ["--version"]).stdout.startswith("finegraft 0.")
    assert json.loads(runner.invoke(app, ["--version", "--json"]).stdout)["version"]


def test_a_usage_error_is_a_box_or_one_object():
    done = runner.invoke(app, ["train", "--lerning-rate", "3"])
    assert done.exit_code == 2
    assert done.stdout == "" and "--learning-rate" in done.stderr
    done = runner.invoke(app, ["train", "--lerning-rate", "3", "--json"])
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "FG-CLI-001"
    assert "--learning-rate" in error["found"]
    assert set(error) == {"code", "found", "allowed", "fix"}


def test_json_after_a_double_dash_is_not_a_flag():
    done = runner.invoke(app, ["doctor", "--", "--json"])
    assert done.exit_code == 2
    assert done.stdout == ""


def test_a_deliberate_error_is_shown_without_a_traceback(monkeypatch):
    error = DataError("FG-TEST-001", "found this", allowed="that", fix="do so")
    failing(monkeypatch, error)
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 2
    for words in ("FG-TEST-001", "found this", "that", "do so"):
        assert words in done.stderr
    assert "Traceback" not in done.output

    done = runner.invoke(app, ["doctor", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout) == {"error": error.as_dict()}
    assert "noise" in done.stderr


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    failing(monkeypatch, DataError("FG-TEST-001", "found this"))
    done = runner.invoke(app, ["doctor"], env={"FINEGRAFT_DEBUG": "1"})
    assert isinstance(done.exception, DataError)


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"]])
def test_ctrl_c_is_130_and_one_line(monkeypatch, words):
    failing(monkeypatch, KeyboardInterrupt())
    done = runner.invoke(app, words)
    assert done.exit_code == 130
    if "--json" in words:
        assert json.loads(done.stdout)["error"]["found"] == "stopped by Ctrl-C"
    else:
        assert done.stderr == "stopped by Ctrl-C\n"


def test_an_exit_status_of_a_command_survives_json(monkeypatch):
    failing(monkeypatch, typer.Exit(1))
    assert runner.invoke(app, ["doctor", "--json"]).exit_code == 1


BUG = (
    "import finegraft.cli.doctor as d\n"
    "def fail(): raise RuntimeError('surprise')\n"
    "d.system = fail\n"
    "from finegraft.cli.main import main; main()"
)


def test_a_bug_is_one_message_unless_debugging():
    done = shell("doctor", code=BUG)
    assert done.returncode == 1
    assert "FG-CLI-004" in done.stderr and "surprise" in done.stderr
    assert "Traceback" not in done.stderr
    done = shell("doctor", "--json", code=BUG)
    assert json.loads(done.stdout)["error"]["code"] == "FG-CLI-004"
    done = shell("doctor", code=BUG, FINEGRAFT_DEBUG="1")
    assert "Traceback" in done.stderr and done.returncode == 1


def test_importing_the_command_line_changes_nothing():
    code = (
        "import os, sys, logging, warnings\n"
        "before = dict(os.environ), sys.excepthook, list(warnings.filters)\n"
        "import finegraft.cli.main\n"
        "assert before == (dict(os.environ), sys.excepthook, list(warnings.filters))\n"
        "assert not logging.getLogger('finegraft').handlers"
    )
    done = shell(code=code)
    assert done.returncode == 0, done.stderr
