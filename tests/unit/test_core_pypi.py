"""Files from a registry: a folder of our own stands in for it, with the real pip."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from finegraft.core import pypi

SETUP = """
from pathlib import Path
Path({ran!r}).write_text("ran")
from setuptools import setup
setup(name="pinned", version="1.0")
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A pip that sees one folder and nothing else, and builds with this environment's tools."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads the 0 as "no isolation"
    return shelf


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "to").mkdir()
    return tmp_path / "to"


def put_wheel(shelf):
    file = shelf / "pinned-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        info = "pinned-1.0.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: pinned\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def put_sdist(shelf, ran):
    file = shelf / "pinned-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, text in (
            ("setup.py", SETUP.format(ran=str(ran))),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: pinned\nVersion: 1.0\n"),
        ):
            member = tarfile.TarInfo(f"pinned-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_wheel(registry, folder):
    sha256 = put_wheel(registry)
    file = pypi.download("pinned==1.0", sha256, folder)
    assert file == folder / "pinned-1.0-py3-none-any.whl"
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_an_sdist(registry, folder, tmp_path):
    sha256 = put_sdist(registry, tmp_path / "ran")
    file = pypi.download("pinned==1.0", sha256, folder, "sdist")
    assert file == folder / "pinned-1.0.tar.gz"
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_no_code_of_another_sdist_is_run(registry, folder, tmp_path):
    sha256 = put_sdist(registry, tmp_path / "ran")
    with pytest.raises(pypi.WrongChecksum, match=rf"pinned==1\.0 has sha256 {sha256}"):
        pypi.download("pinned==1.0", "0" * 64, folder, "sdist")
    assert not (tmp_path / "ran").exists()
    assert list(folder.iterdir()) == []


def test_another_wheel_is_removed(registry, folder):
    sha256 = put_wheel(registry)
    with pytest.raises(pypi.WrongChecksum, match=r"any\.whl has sha256") as caught:
        pypi.download("pinned==1.0", "0" * 64, folder)
    assert caught.value.found == sha256
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_registry_without_it(registry, folder, kind):
    with pytest.raises(pypi.Unreachable, match=r"No matching distribution found for pinned==1\.0"):
        pypi.download("pinned==1.0", "0" * 64, folder, kind)
    assert list(folder.iterdir()) == []


def test_without_pip_another_one_on_the_path_serves(monkeypatch):
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pypi.shutil, "which", lambda name: "/x/pip3" if "3" in name else None)
    assert pypi.pip() == ["/x/pip3"]
    monkeypatch.setattr(pypi.shutil, "which", lambda name: None)
    with pytest.raises(pypi.Unreachable, match="no pip here"):
        pypi.pip()
