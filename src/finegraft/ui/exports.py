"""Exports: what a run can be written as, how large it gets, and what was written.

What: ``formats`` describes every format for a run, ``written`` lists the exports of the workspace.
How: formats from ``finegraft.export``, whose ``problems`` say what stands in the way; exports by
the ``verification.json`` that each carries. Constraint: nothing is written or loaded here.
Trade-off: sizes are parameters times bits, a few percent off where a format keeps some tensors in
more bits.

Units: bytes.
"""

from __future__ import annotations

import json
import shlex
import threading
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError
from finegraft.ui import replies
from finegraft.ui.record import Record
from finegraft.ui.workspace import EXPORTS, Workspace

_MARK = "verification.json"
_MOST_EXPORTS = 200
_KEPT = 8
_BITS = {
    "merged_16bit": 16.0,
    "merged_4bit": 5.0,
    "vllm:merged": 16.0,
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.6,
    "q5_1": 6.0,
    "q5_k_m": 5.7,
    "q5_k_s": 5.5,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_k_m": 4.8,
    "q4_k_s": 4.6,
    "q4_0": 4.5,
    "q3_k_m": 3.9,
    "q2_k": 2.9,
}
_OF_ADAPTER = ("lora", "gguf_lora", "vllm:adapter", "ollama:adapter")


class Formats:
    """Formats, described once for each state of a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def of(self, run: Path | None, record: Record | None) -> list[dict[str, Any]]:
        """Every format; with sizes and problems for a run."""
        key = (str(run), record.offset if record else 0)
        with self._lock:
            if key not in self._known:
                while len(self._known) >= _KEPT:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = list(_formats(run, record))
            return self._known[key]


def _formats(run: Path | None, record: Record | None) -> Any:
    from finegraft.export import FORMATS

    counts = record.last("start") if record else {}
    problems: dict[str, Any] = {}
    for name, form in FORMATS.items():
        for variant in form.variants or ("",):
            full = f"{name}:{variant}" if variant else name
            group = full if full in _OF_ADAPTER else name
            if run is not None and group not in problems:
                problems[group] = _problem(name, variant, run)
            yield {
                "name": full,
                "help": form.variants[variant] if variant else form.summary,
                "format": name,
                "summary": form.summary,
                "size_bytes": _size(full, counts, run),
                "problem": problems.get(group),
            }


def _problem(name: str, variant: str, run: Path) -> dict[str, Any] | None:
    """What stands in the way of a format, as the export itself would say it."""
    from finegraft.export import FORMATS, _save
    from finegraft.export._origin import open_origin

    try:
        origin = open_origin(str(run))
        given = _save._given(name, origin)
        found = FORMATS.get(name).problems(given, run / "no-such-folder", [variant] * bool(variant))
    except FinegraftError as error:
        return replies.error_values(error)
    first = found[0] if found else None
    return replies.error_values(first) if isinstance(first, FinegraftError) else None


def _size(full: str, counts: dict[str, Any], run: Path | None) -> int | None:
    """Bytes of an export, from the parameters that the run counted."""
    if run is None or not counts.get("parameters"):
        return None
    if full in _OF_ADAPTER or full.startswith("gguf_lora"):
        file = run / "adapter" / "adapter_model.safetensors"
        return file.stat().st_size if file.is_file() else None
    base = counts["parameters"] - (counts["trainable"] if (run / "adapter").is_dir() else 0)
    bits = _BITS.get(full, _BITS.get(full.partition(":")[2]))
    return int(base * bits / 8) if bits else None


def written(space: Workspace) -> list[dict[str, Any]]:
    """Exports of the workspace, the newest first."""
    folder = space.root / EXPORTS
    marks = sorted(folder.rglob(_MARK), key=lambda p: -p.stat().st_mtime)
    return [entry for mark in marks[:_MOST_EXPORTS] for entry in _entries(mark, space)]


def _entries(mark: Path, space: Workspace) -> list[dict[str, Any]]:
    try:
        values = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if "files" not in values:
        return [_entry(mark.parent, values, space)]
    files = [(mark.parent / name, told) for name, told in values["files"].items()]
    return [_entry(path, told, space) for path, told in files if path.is_file()]


def _entry(path: Path, told: dict[str, Any], space: Workspace) -> dict[str, Any]:
    inside = path.rglob("*") if path.is_dir() else [path]
    name = space.name_of(path)
    kind = str(told.get("format"))
    return {
        "path": name,
        "run": _run_of(told, space),
        "format": kind,
        "size_bytes": sum(p.stat().st_size for p in inside if p.is_file()),
        "verified": bool(told.get("verified")),
        "cause": told.get("cause"),
        "checks": told.get("checks") or [],
        "modified": path.stat().st_mtime,
        "commands": _commands(path, name, kind),
    }


def _run_of(told: dict[str, Any], space: Workspace) -> str | None:
    """The name of the run that it was compared with."""
    path = Path(str(told.get("against")))
    inside = path.is_relative_to(space.runs) and path != space.runs
    return path.relative_to(space.runs).as_posix() if inside else None


def _commands(path: Path, name: str, kind: str) -> list[str]:
    """What to type with an export."""
    words = shlex.quote(name)
    check = f"finegraft verify {words}"
    if kind.startswith("gguf_lora"):
        return [f"llama-server -m BASE.gguf --lora {words}", check]
    if (path.parent / "Modelfile").is_file() and path.is_file():
        file = shlex.quote(f"{Path(name).parent}/Modelfile")
        return [f"ollama create {shlex.quote(path.stem.lower())} -f {file}", check]
    if (path / "serve.sh").is_file():
        return [shlex.quote(f"{name}/serve.sh"), check]
    found = [f'finegraft generate {words} "your question"', f"finegraft serve {words}"]
    return [*found, f"llama-server -m {words}", check] if path.is_file() else [*found, check]
