"""Write what comes from the source: config.md, errors.md and the data of ``finegraft explain``.

What: ``python docs/make.py`` writes them, ``--check`` only says whether they are current. How: the
settings are read from the schema, the errors from the syntax trees of ``src/finegraft``, where each
is a call of an error class whose first argument is a code; longer texts come from
``core/explanations/texts.yaml``, findings from the tables of their checks. Constraint: nothing is
run to find the errors, so what a message holds at run time stands there as ``<name>``. Trade-off: a
text that a helper function receives as an argument is shown as that argument's name.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finegraft.core import errors, explanations, schema
from finegraft.core.registry import Registry

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "finegraft"
CODE = re.compile(r"FG-[A-Z]+-\d{3}")
NOTE = "<!-- Written by docs/make.py from the source; after a change there: python docs/make.py -->"

PARTS = {
    "ADAPT": "Adapters",
    "ARG": "Keyword arguments",
    "CHECK": "Findings of the data check",
    "CLASS": "Classification",
    "CLI": "Command line",
    "CONF": "Configuration",
    "CORE": "Names of formats, methods and kernels",
    "DATA": "Rows and their rendering",
    "DISK": "Folders and disks",
    "DIST": "Several processes",
    "EVAL": "Evaluation",
    "EXPORT": "Exporting",
    "GEN": "Generating",
    "HUB": "Hub uploads",
    "KERNEL": "Kernels",
    "LADDER": "Comparing methods",
    "MODEL": "Models and tokenizers",
    "PLAN": "Forecasts",
    "RAY": "Ray",
    "RUN": "Run folders",
    "SCORE": "Scoring",
    "SERVE": "Serving",
    "STREAM": "Streamed rows",
    "SWEEP": "Sweeps",
    "TOKEN": "New tokens",
    "UI": "The web page",
    "WATCH": "Watchdogs of training",
}


@dataclass(frozen=True)
class Raised:
    """One place in the source that makes an error."""

    code: str
    kind: str
    file: str
    found: str
    allowed: str
    fix: str


def _skeleton(node: ast.expr | None, local: dict[str, ast.expr]) -> str:
    """The text of an expression, with ``<name>`` for what is known at run time only."""
    if isinstance(node, ast.Constant):
        return "" if node.value is None else str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_skeleton(part, local) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _skeleton(node.value, local)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and not _is_sum(node):
        return _skeleton(node.left, local) + _skeleton(node.right, local)
    if isinstance(node, ast.IfExp | ast.BoolOp):
        parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
        texts = [text for part in parts if (text := _skeleton(part, local))]
        return " / ".join(dict.fromkeys(texts))
    if isinstance(node, ast.Name):
        return _skeleton(local[node.id], {}) if node.id in local else f"<{node.id}>"
    if isinstance(node, ast.Attribute):
        return "<type>" if node.attr == "__name__" else f"<{node.attr}>"
    return "" if node is None else _placeholder(node)


def _is_sum(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(s, ast.Constant) and isinstance(s.value, int) for s in sides)


def _placeholder(node: ast.expr) -> str:
    """A name for an expression that is more than a name."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
        "did_you_mean",
        "suggestion",
    ):
        return "<a near name>"
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    names = {
        n.id
        for n in ast.walk(node)
        if isinstance(n, ast.Name) and id(n) not in called and n.id not in {*bound, *dir(builtins)}
    }
    return f"<{names.pop()}>" if len(names) == 1 else "<...>"


def _texts_of(function: ast.AST) -> dict[str, ast.expr]:
    """Names that a function sets once, to a text."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) == 1 and isinstance(values[0], ast.JoinedStr | ast.Constant)
    }


def raised() -> Iterator[Raised]:
    """Every place that makes an error of finegraft, in the order of files and lines."""
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.FinegraftError)
    }
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda call: call.lineno):
            kind = getattr(call.func, "id", "")
            code = call.args[0] if call.args else None
            if kind not in kinds or not isinstance(code, ast.Constant):
                continue
            around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
            local = _texts_of(around[-1]) if around else {}
            more = {keyword.arg: keyword.value for keyword in call.keywords}
            yield Raised(
                code=str(code.value),
                kind=kind,
                file=str(path.relative_to(SOURCE)),
                found=_skeleton(call.args[1], local),
                allowed=_skeleton(more.get("allowed"), local),
                fix=_skeleton(more.get("fix"), local),
            )


def mentioned() -> set[str]:
    """Every code that stands anywhere in the source."""
    return {
        code
        for path in SOURCE.rglob("*.py")
        for code in CODE.findall(path.read_text(encoding="utf-8"))
    }


def _quoted(text: str) -> str:
    """Inline code, on one line, whatever the text holds."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _builtin(kind: str) -> str:
    return next(b.__name__ for b in getattr(errors, kind).__mro__ if b.__module__ == "builtins")


def findings() -> dict[str, dict[str, str]]:
    """Findings, which are no errors: of the data check and of the watch over training."""
    from finegraft.training.watch import FINDINGS

    families: Registry[Any] = Registry("finegraft.data.audit.checks", "CHECKS", "data check")
    found = {
        check.code: {
            "title": check.title,
            "cause": check.cause,
            "cure": check.cure,
            "example": check.example,
        }
        for _, checks in families.items()
        for check in checks
    }
    for code, watched in FINDINGS.items():
        found[code] = {
            "title": watched.title,
            "cause": watched.cause,
            "cure": watched.cure,
            "example": f"{code}: {watched.title}",
        }
    return dict(sorted(found.items()))


def explained() -> str:
    """core/explanations/codes.json."""
    by_code: dict[str, list[dict[str, str]]] = {}
    for item in dict.fromkeys(raised()):
        place = {
            "kind": item.kind,
            "builtin": _builtin(item.kind),
            "file": item.file,
            "found": " ".join(item.found.split()),
            "allowed": " ".join(item.allowed.split()),
            "fix": " ".join(item.fix.split()),
        }
        by_code.setdefault(item.code, []).append(place)
    told = findings()
    values = {
        "parts": PARTS,
        "errors": {code: by_code[code] for code in sorted(by_code) if code not in told},
        "findings": told,
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _told(code: str) -> list[str]:
    """Cause, cure and example of a code that has texts of its own."""
    text = explanations.texts().get(code)
    if text is None:
        return []
    lines = [f"**{text['title']}** {' '.join(text['cause'].split())}", ""]
    lines += [f"Cure: {' '.join(text['cure'].split())}", ""]
    return [*lines, "```text", text["example"].rstrip(), "```", ""]


def errors_page() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        NOTE,
        "",
        "Every deliberate error is a `FinegraftError` with a code that keeps its meaning, what was",
        "found, what is allowed and what fixes it. It is also the builtin named in brackets.",
        "`<name>` stands for what is filled in at run time. The command line prints the message",
        "and exits with 2; `FINEGRAFT_DEBUG=1` shows the traceback instead. In a terminal,",
        "`finegraft explain CODE` shows the same.",
    ]
    by_code: dict[str, list[Raised]] = {}
    for item in raised():
        by_code.setdefault(item.code, []).append(item)
    told = findings()
    part = ""
    for code in sorted({**by_code, **told}):
        if code.split("-")[1] != part:
            part = code.split("-")[1]
            lines += ["", f"## {PARTS.get(part, part)}"]
        lines += ["", f"### {code}", "", *_told(code)]
        if code in told:
            words = {key: " ".join(text.split()) for key, text in told[code].items()}
            lines += [f"**{words['title']}.** {words['cause']}", "", f"Cure: {words['cure']}"]
        for item in dict.fromkeys(by_code.get(code, [])):
            lines.append(
                f"- {_quoted(item.found)}, `{item.kind}` (`{_builtin(item.kind)}`), `{item.file}`"
            )
            for word, text in (("allowed", item.allowed), ("fix", item.fix)):
                if text:
                    lines.append(f"  - {word}: {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation)
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    return choices[1].replace("'", "") if choices else text.replace("typing.", "")


def _default(info: Any) -> str:
    if info.is_required():
        return "required"
    return "unset" if info.default is None else f"`{info.default!r}`".replace("'", '"')


def _limits(info: Any) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(
        f"{words} {getattr(limit, sign)}"
        for limit in info.metadata
        for sign, words in signs.items()
        if hasattr(limit, sign)
    )


def config_page() -> str:
    """docs/config.md."""
    lines = [
        "# Settings of a training run",
        "",
        NOTE,
        "",
        "The same keys everywhere: in a YAML file (`finegraft train settings.yaml`), as",
        "`--set key=value`, and as flags (`--key value`, `--key/--no-key` for true and false;",
        "dashes or underscores). A flag wins over `--set`, and `--set` over the file. An unknown",
        "key is an error with a near name, and all problems are told at once. The run folder keeps",
        "the complete settings in `config.yaml`, from which the run can be repeated.",
    ]
    for group, names in schema.groups().items():
        lines += ["", f"## {group.capitalize()}", "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        for name in names:
            info = schema.TrainConfig.model_fields[name]
            meaning = "; ".join(filter(None, [info.description, _limits(info)]))
            cells = (f"`{name}`", _type(info.annotation), _default(info), meaning)
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Each file that comes from the source, with its text."""
    return {
        DOCS / "config.md": config_page(),
        DOCS / "errors.md": errors_page(),
        explanations.FOLDER / "codes.json": explained(),
    }


def stale() -> list[Path]:
    """The pages whose file is missing or differs."""
    return [
        path
        for path, text in pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Write the pages, or with ``--check`` say which are not current."""
    if "--check" in sys.argv[1:]:
        for path in stale():
            print(f"{path} is not current: python docs/make.py")
        return 1 if stale() else 0
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
