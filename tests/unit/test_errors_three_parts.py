"""Every error of the source says what was found and what to do, in words that can be acted on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from finegraft.core import errors

SOURCE = Path(errors.__file__).parents[1]
KINDS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.FinegraftError)
}
# What says nothing that the message has not said before it.
VAGUE = re.compile(r"(?:see|read) (?:the )?(?:reason|message|error)(?: above)?|fix (?:it|this)|")
SHORTEST = 8  # characters: "pass r=16"


def branches(node: ast.expr | None) -> list[ast.expr | None]:
    """What an expression can be: both sides of ``a if b else c`` and of ``a or b``."""
    if isinstance(node, ast.IfExp):
        return branches(node.body) + branches(node.orelse)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return branches(node.values[-1])  # the others are taken only when they say something
    return [node]


def problems(source: str, name: str) -> list[str]:
    """Calls of error classes in a file that lack a part."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") not in KINDS:
            continue
        where = f"{name}:{call.lineno}"
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if len(call.args) < 2 or not getattr(call.args[1], "value", "words"):
            found.append(f"{where} does not say what was found")
        for fix in branches(named.get("fix")):
            text = getattr(fix, "value", "a text made at run time")
            if fix is None or text is None:
                found.append(f"{where} has no fix, at least not always")
            elif isinstance(text, str) and (
                VAGUE.fullmatch(text.strip(" .")) or len(text) < SHORTEST
            ):
                found.append(f"{where} has a fix that says nothing: {text!r}")
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_error_says_what_to_do(path):
    assert problems(path.read_text(encoding="utf-8"), str(path.relative_to(SOURCE))) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('DataError("FG-DATA-001", "found")', "no fix"),
        ('DataError("FG-DATA-001", "found", fix=None)', "no fix"),
        ('DataError("FG-DATA-001", "found", fix="pass a file" if x else None)', "no fix"),
        ('DataError("FG-DATA-001", "found", fix=x or None)', "no fix"),
        ('DataError("FG-DATA-001", "found", fix="see the reason above")', "says nothing"),
        ('DataError("FG-DATA-001", "found", fix="")', "says nothing"),
        ('DataError("FG-DATA-001", "", fix="pass the path of a file")', "what was found"),
    ],
)
def test_what_lacks_a_part_is_noticed(words, said):
    (problem,) = problems(words, "a.py")
    assert said in problem


def test_a_whole_error_is_no_problem():
    assert problems('DataError("FG-DATA-001", f"no {x}", fix="pass a file")', "a.py") == []
    assert problems("DataError(e.code, e.found, fix=e.fix)", "a.py") == []
