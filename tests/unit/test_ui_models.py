"""``finegraft models`` and the page's list: what the caches hold, and freeing it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ui_tiny import served, write_run

from finegraft.core.errors import ModelError
from finegraft.models import stored

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """finegraft's cache with a packaged model, and the hub's with one of 2,000 bytes."""
    demo = tmp_path / "cache" / "finegraft" / "models" / "demo"
    demo.mkdir(parents=True)
    (demo / "config.json").write_text("{}")
    (demo / "model.safetensors").write_bytes(b"x" * 1000)
    (demo.parent / ".demo.lock").touch()
    repo = tmp_path / "hub" / "models--some--thing"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "blobs" / "aa").write_bytes(b"x" * 2000)
    (repo / "refs" / "main").write_text(COMMIT)
    (snapshot / "model.safetensors").symlink_to(repo / "blobs" / "aa")
    (tmp_path / "hub" / "datasets--a--b" / "snapshots").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def command(caches, *words):
    env = {**os.environ, "HF_HUB_CACHE": str(caches / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "finegraft.cli.main", "models", *words, "--json"],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout)


def test_the_command_lists_and_removes(caches):
    status, found = command(caches, "list")
    assert status == 0
    assert [(one["name"], one["kind"], one["size_bytes"]) for one in found["models"]] == [
        ("demo", "packaged", 1002),
        ("some/thing", "hub", 2000),
    ]
    assert found["size_bytes"] == 3002
    status, gone = command(caches, "remove", "some/thing")
    assert (status, gone["freed_bytes"]) == (0, 2000)
    assert not (caches / "hub" / "models--some--thing" / "snapshots" / COMMIT).exists()
    status, found = command(caches, "remove", "some/thing")
    assert (status, found["error"]["code"]) == (2, "FG-MODEL-001")
    assert "demo" in found["error"]["allowed"]


def test_nothing_is_stored_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    assert stored.models() == []
    with pytest.raises(ModelError, match="FG-MODEL-001"):
        stored.remove("demo")


def test_the_page_lists_and_removes(caches):
    write_run(caches / "work" / "runs" / "a", 1, model="some/thing")
    with served(caches / "work") as (page, desk):
        page.sign_in(desk.sessions.token())
        assert page("GET", "/api/state").json["models"] == ["demo", "demo-encoder", "some/thing"]
        found = page("GET", "/api/models").json
        assert {one["name"]: one["used_by"] for one in found["models"]} == {
            "demo": [],
            "some/thing": ["a"],
        }
        assert found["fetchable"] == ["demo-encoder"]
        gone = page("DELETE", "/api/models/some%2Fthing").json
        assert gone == {"freed_bytes": 2000, "command": "finegraft models remove some/thing"}
        assert page("DELETE", "/api/models/..%2F..%2Fwork").status == 422
        page("DELETE", "/api/models/demo")
        assert page("GET", "/api/models").json["models"] == []
    assert (caches / "work" / "runs" / "a").exists()
