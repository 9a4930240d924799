"""Flags of ``finegraft serve``; what it does when it runs is in the end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from finegraft.cli import main, serve
from finegraft.core.errors import ConfigError


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["finegraft", *words])
    with pytest.raises(SystemExit) as ending:
        main.main()
    return ending.value.code, capsys.readouterr()


def test_adapters_are_named():
    assert serve.adapters_from(["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    for words in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="FG-SERVE-005"):
            serve.adapters_from(words)


def test_an_open_address_without_a_key_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    status, shown = command(monkeypatch, capsys, "serve", "demo", "--host", "0.0.0.0", "--json")
    assert status == 2
    assert json.loads(shown.out)["error"]["code"] == "FG-SERVE-001"
    monkeypatch.setenv(serve.KEY_VARIABLE, "short")
    status, shown = command(monkeypatch, capsys, "serve", "demo", "--json")
    assert json.loads(shown.out)["error"]["code"] == "FG-SERVE-001"
    assert "short" not in shown.out.replace("too short", "") + shown.err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, shown = command(monkeypatch, capsys, "serve", "demo", "--json")
    assert status == 2
    error = json.loads(shown.out)["error"]
    assert error["code"] == "FG-SERVE-002" and "finegraft[serve]" in error["fix"]


def test_help_lists_the_flags(monkeypatch, capsys):
    status, shown = command(monkeypatch, capsys, "serve", "--help")
    assert status == 0
    for flag in ("--adapter", "--engine", "--host", "--api-key", "--queue", "--context"):
        assert flag in shown.out


def test_torch_waits_less_eagerly_unless_it_is_told_how(monkeypatch, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for already, model, expected in (
        ({}, "demo", "3000"),
        ({}, str(file), None),
        ({"GOMP_SPINCOUNT": "7"}, "demo", "7"),
        ({"OMP_WAIT_POLICY": "active"}, "demo", None),
    ):
        monkeypatch.setattr(os, "environ", dict(already))
        serve.share_the_machine(model)
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_nothing_has_loaded_torch_when_the_command_begins():
    code = "import sys, finegraft.cli.main, finegraft.serving.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
