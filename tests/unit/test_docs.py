"""The documentation agrees with the source: generated pages, codes, names, links and code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import yaml

from finegraft.core import explanations
from finegraft.core.schema import TrainConfig, build

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_generated_pages_are_current(make):
    assert make.stale() == [], "python docs/make.py"


def test_every_code_of_the_source_is_explained(make):
    on_page = set(re.findall(r"^### (FG-\S+)$", page("docs/errors.md"), re.MULTILINE))
    assert on_page == make.mentioned() | set(make.findings())
    assert on_page == set(explanations.codes())


def test_every_setting_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", page("docs/config.md"), re.MULTILINE))
    assert rows == set(TrainConfig.model_fields)


def test_every_argument_of_the_facade_is_in_the_unsloth_table():
    from finegraft import fast
    from finegraft.training import arguments

    text = page("docs/unsloth.md")
    loading, adapting = text.split("## FastLanguageModel.get_peft_model")
    names = {
        loading: [fast.FastLanguageModel.from_pretrained, fast._LOADING, fast._LOAD_EXTRAS],
        adapting: [fast.FastLanguageModel.get_peft_model, fast._ADAPTING, fast._LORA_EXTRAS],
    }
    for part, (function, answered, passed) in names.items():
        known = [*inspect.signature(function).parameters, *answered, *passed]
        missing = [name for name in known if name != "more" and f"`{name}`" not in part]
        assert missing == []
    renamed = [k for k, rule in arguments.LEGACY.items() if isinstance(rule, arguments.Rename)]
    assert [n for n in renamed if n not in text and not n.startswith("per_gpu")] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(BLOCK.sub("", text)):
        if target.startswith("http"):
            continue
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), anchor


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_code_blocks_can_be_read(path):
    commands = set(re.findall(r"^\| `finegraft (\w+)", page("docs/cli.md"), re.MULTILINE))
    for language, code in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language == "python":
            compile(ast.parse(code), str(path), "exec")
        if language == "sh":
            used = set(re.findall(r"^finegraft (\w+)", code, re.MULTILINE))
            assert used <= commands
            targets = set(re.findall(r"^make ([\w-]+)", code, re.MULTILINE))
            assert all(f"\n{name}:" in page("Makefile") for name in targets)


def test_commands_are_those_of_the_program():
    import typer

    from finegraft.cli.main import app

    listed = set(re.findall(r"^\| `finegraft (\w+)", page("docs/cli.md"), re.MULTILINE))
    assert listed == set(typer.main.get_command(app).commands)


def test_the_readme_is_short_and_has_a_place_for_the_benchmark():
    text = page("README.md")
    assert text.count("\n") < 200
    assert text.count("<!-- benchmark:start -->") == text.count("<!-- benchmark:end -->") == 1


def test_the_mapping_in_the_data_page_is_a_setting():
    values = yaml.safe_load(re.search(r"In YAML: `(.*?)`", page("docs/data.md"))[1])
    assert build({"model": "demo", "data": "x", **values}).map["prompt"] == "question"
