"""The design as a test: import direction, confined dependencies, sizes, inert imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "finegraft"
FILES = sorted(SOURCE.rglob("*.py"))

# Lower number, lower layer. Imports point downward; layers of one rank never import one another.
RANK = {
    "core": 0,
    "data": 1,
    "kernels": 1,
    "models": 2,
    "adapters": 3,
    "opening": 4,
    "training": 5,
    "inference": 5,
    "export": 5,
    "classifier": 6,
    "fast": 6,
    "serving": 7,
    "ui": 8,
    "cli": 9,  # starts the page
}
NEVER = {("data", "models"), ("data", "kernels"), ("kernels", "data")}
# Where a dependency may be imported, as path prefixes below the package.
CONFINED = {
    "triton": ("kernels/",),
    "numba": ("kernels/", "inference/step_loops.py"),
    "llvmlite": ("kernels/_compile.py", "kernels/nf4/loops.py", "inference/step_loops.py"),
    "bitsandbytes": ("models/quantize.py", "kernels/nf4/"),
    "peft": ("adapters/", "opening.py"),
    "trl": ("training/",),
    "gguf": ("export/gguf/", "models/gguf.py"),
    "optuna": ("training/sweep/search.py",),
    "ray": ("training/ray_job.py",),
    "libgguf": ("export/gguf/",),
    "fastapi": ("serving/", "ui/"),
    "uvicorn": ("serving/", "ui/"),
    "starlette": ("serving/", "ui/"),
    "h11": ("serving/",),
    "xllamacpp": ("serving/", "export/"),
    "typer": ("cli/",),
    "rich": ("cli/", "ui/"),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 100


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere, ``TYPE_CHECKING`` blocks left out."""
    found: list[str] = []

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if "TYPE_CHECKING" not in ast.dump(node.test):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.extend(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def layer(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downward(path):
    own = layer(path)
    if own not in RANK:
        known = {"__init__", "chat_templates", "__main__", "peft_plugin"}
        assert own in known, f"{own} has no layer"
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "finegraft" or len(parts) < 2 or parts[1] not in RANK:
            continue
        other = parts[1]
        allowed = other == own or (RANK[other] < RANK[own] and (own, other) not in NEVER)
        assert allowed, f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_dependencies_are_confined(path):
    where = str(path.relative_to(SOURCE))
    for name in imports(path):
        allowed = CONFINED.get(name.split(".")[0])
        assert allowed is None or where.startswith(allowed), f"{where} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_sizes_and_habits(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    where = str(path.relative_to(SOURCE))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
        if isinstance(node, ast.ExceptHandler):
            caught = getattr(node.type, "id", None)
            reraises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            assert node.type is not None and (caught != "Exception" or reraises), "broad except"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert where.startswith(("cli/", "ui/")), "library code logs, it does not print"


def test_every_module_says_what_it_is():
    for path in FILES:
        if path.name != "__init__.py" or path.stat().st_size > 1:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


INERT = """
import json, logging, os, sys, time
import torch, transformers, peft, trl
def picture():
    return {
        "environment": dict(os.environ),
        "meta_path": [repr(f) for f in sys.meta_path],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "attributes": {
            m.__name__: {k: id(v) for k, v in vars(m).items()}
            for m in [sys.modules[n] for n in sorted(sys.modules)
                      if n.split(".")[0] in ("torch", "transformers", "peft", "trl")]
        },
    }
before = picture()
import finegraft
after = picture()
print(json.dumps({k: before[k] == after[k] for k in before}))
"""

ALONE = """
import json, sys, time
start = time.perf_counter()
import finegraft
seconds = time.perf_counter() - start
others = ("torch", "transformers", "peft", "trl", "numpy", "rich", "typer", "pydantic")
heavy = [name for name in others if name in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_nothing():
    assert run(INERT) == {
        "environment": True,
        "meta_path": True,
        "logging": True,
        "attributes": True,
    }


def test_importing_imports_nothing_and_is_quick():
    found = run(ALONE)
    assert found["heavy"] == []
    assert found["seconds"] < 0.3


def test_every_public_name_can_be_imported():
    import finegraft

    assert all(getattr(finegraft, name) is not None for name in finegraft.__all__)
    with pytest.raises(AttributeError):
        finegraft.no_such_name  # noqa: B018
