"""The hub, its refusals and a machine without a network, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubserver import HubServer, Repo, client_env

CLIENT = """
import json, sys
from finegraft.core.errors import FinegraftError
from finegraft.models.locate import locate
name, revision, token = (json.loads(a) for a in sys.argv[1:])
try:
    found = locate(name, revision=revision, token=token)
    print(json.dumps({"kind": found.kind, "base": found.base,
                      "files": sorted(p.name for p in found.path.iterdir())}))
except FinegraftError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    def folder(name, *files):
        path = tmp_path_factory.mktemp(name)
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_text("{}")
        return path

    both = folder(
        "both", "config.json", "model.safetensors", "pytorch_model.bin", "original/params.json"
    )
    adapter = folder("adapter", "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "a/both"}')
    with HubServer() as server:
        server.repos = {
            "a/both": Repo(both, revisions=("main", "v1")),
            "a/pickled": Repo(folder("pickled", "config.json", "pytorch_model.bin", "x.bin")),
            "a/adapter": Repo(adapter),
            "a/gguf": Repo(folder("gguf", "config.json", "model.Q4_0.gguf")),
            "a/gated": Repo(folder("gated", "config.json", "model.safetensors"), "gated"),
            "a/private": Repo(folder("private", "config.json", "model.safetensors"), "private"),
        }
        yield server


def ask(endpoint, home, name, revision=None, token=None, **env):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *map(json.dumps, (name, revision, token))],
        env=client_env(endpoint, home, **env),
        capture_output=True,
        text=True,
        timeout=100,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_safetensors_are_fetched_and_the_pickle_beside_them_is_not(hub, tmp_path):
    assert ask(hub.url, tmp_path, "a/both")["files"] == ["config.json", "model.safetensors"]


def test_a_repository_with_pickles_only_gets_its_model_pickle(hub, tmp_path):
    assert ask(hub.url, tmp_path, "a/pickled")["files"] == ["config.json", "pytorch_model.bin"]


def test_an_adapter_on_the_hub_names_its_base(hub, tmp_path):
    found = ask(hub.url, tmp_path, "a/adapter")
    assert (found["kind"], found["base"]) == ("adapter", "a/both")


def test_the_second_time_works_offline(hub, tmp_path):
    first = ask(hub.url, tmp_path, "a/both", revision="v1")
    before = len(hub.requests)
    assert ask(hub.url, tmp_path, "a/both", revision="v1", HF_HUB_OFFLINE="1") == first
    assert len(hub.requests) == before


def test_an_unknown_repository_is_named_with_a_near_one(hub, tmp_path):
    error = ask(hub.url, tmp_path, "demo-encoderr")["error"]
    assert "FG-MODEL-001: no model 'demo-encoderr'" in error
    assert "did you mean 'demo-encoder'?" in error


def test_a_near_local_folder_is_suggested(hub, tmp_path):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    assert "did you mean './my-model'?" in ask(hub.url, tmp_path, "my-modle")["error"]


def test_a_name_the_hub_could_not_have(hub, tmp_path):
    assert "FG-MODEL-001" in ask(hub.url, tmp_path, "a/b?c")["error"]


def test_an_unknown_revision(hub, tmp_path):
    error = ask(hub.url, tmp_path, "a/both", revision="v9")["error"]
    assert "FG-MODEL-004: 'a/both' has no revision 'v9'" in error


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_repository_says_how_to_pass_a_token(hub, tmp_path, token):
    error = ask(hub.url, tmp_path, "a/gated", token=token)["error"]
    assert "FG-MODEL-003" in error
    assert f"{hub.url}/a/gated" in error
    assert "HF_TOKEN" in error


def test_a_wrong_token_is_not_called_an_unknown_model(hub, tmp_path):
    assert "FG-MODEL-003" in ask(hub.url, tmp_path, "a/both", token="hf_bad")["error"]


def test_the_right_token_opens_gated_and_private(hub, tmp_path):
    assert ask(hub.url, tmp_path, "a/gated", token="hf_good")["kind"] == "directory"
    assert ask(hub.url, tmp_path, "a/private", HF_TOKEN="hf_good")["kind"] == "directory"


def test_a_private_repository_without_a_token_mentions_the_token(hub, tmp_path):
    error = ask(hub.url, tmp_path, "a/private")["error"]
    assert "FG-MODEL-001" in error
    assert "HF_TOKEN" in error


def test_a_repository_without_weights_says_so(hub, tmp_path):
    error = ask(hub.url, tmp_path, "a/gguf")["error"]
    assert "FG-MODEL-005: 'a/gguf' holds neither" in error
    assert ".gguf" in error


def test_no_network_says_what_works_without_one(tmp_path):
    error = ask("http://127.0.0.1:9", tmp_path, "a/both")["error"]
    assert "FG-MODEL-002: 'a/both' is not in the cache" in error
    assert "refused" in error
    assert "'demo'" in error
    assert "HF_ENDPOINT" in error


def test_offline_and_not_cached(hub, tmp_path):
    before = len(hub.requests)
    assert "FG-MODEL-002" in ask(hub.url, tmp_path, "a/both", HF_HUB_OFFLINE="1")["error"]
    assert len(hub.requests) == before
