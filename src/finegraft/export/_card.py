"""A model card that claims what was measured and nothing else.

What: ``write`` makes README.md of an export: base, data with its fingerprint, settings, measures,
the verification with every number. How: from the run folder and the report. Constraint: what is not
known is left out; an export that was not verified says so. Trade-off: no licence is named, because
the base's is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finegraft.core.paths import write_whole
from finegraft.core.schema import TrainConfig
from finegraft.export._origin import Origin
from finegraft.export._verify.contents import CARD
from finegraft.export._verify.report import Report

_MADE = "<!-- Made by finegraft from what was measured; a new export replaces it. -->"
_PLACES = {"model", "data", "eval_data", "output", "overwrite"}
_LIBRARIES = {"lora": "peft", "gguf": "gguf", "gguf_lora": "gguf", "ollama": "gguf"}
_KINDS = {
    "lora": "An adapter for",
    "gguf": "GGUF files of a fine-tune of",
    "gguf_lora": "A GGUF adapter for",
    "ollama": "For Ollama: a fine-tune of",
}
_COMMANDS = {
    "gguf": "llama-server -m {file}",
    "gguf_lora": "llama-server -m BASE.gguf --lora {file}",
    "ollama": "ollama create {stem} -f Modelfile",
}
_USE = {
    "lora": """from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{folder}")""",
    "folder": """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")""",
    "label": """from transformers import pipeline
classify = pipeline("text-classification", model="{folder}")""",
}


def write(
    origin: Origin,
    folder: Path,
    kind: str,
    reports: Sequence[Report],
    files: Sequence[str] = (),
    called: str | None = None,
) -> Path | None:
    """Write the card into ``folder``; None where somebody else's README.md is there.

    Args:
        kind: ``merged_16bit``, ``lora``, ``gguf``, ...
        reports: Of what is in the folder.
        files: Names of GGUF files in it.
        called: What to open it as; None: the name of the folder.
    """
    file = folder / CARD
    if file.is_file() and _MADE not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    parts = [
        _head(origin, kind),
        f"{_MADE}\n\n# {called or origin.called}",
        _about(origin, kind),
        _usage(origin, called or folder.name, kind, files),
        _data(origin),
        _settings(origin.settings),
        _measures(origin.metrics),
        _verification(reports),
    ]
    write_whole(file, "\n\n".join(part for part in parts if part) + "\n")
    return file


def _head(origin: Origin, kind: str) -> str:
    """The metadata that model hubs read."""
    label = origin.task != "causal"
    library = _LIBRARIES.get(kind, "transformers")
    lines = [
        "---",
        f"base_model: {_text(origin.base)}",
        f"library_name: {library}",
        f"pipeline_tag: {'text-classification' if label else 'text-generation'}",
        "tags:",
        "- finegraft",
        "---",
    ]
    return "\n".join(lines)


def _text(value: str) -> str:
    return f'"{value}"' if any(c in value for c in ":#'{}[]") else value


def _about(origin: Origin, kind: str) -> str:
    method = f" Method: {origin.settings.method}." if origin.settings else ""
    return f"{_KINDS.get(kind, 'A fine-tune of')} `{origin.base}`, made with finegraft.{method}"


def _usage(origin: Origin, name: str, kind: str, files: Sequence[str]) -> str:
    if kind in _COMMANDS:
        lines = [_COMMANDS[kind].format(file=file, stem=Path(file).stem.lower()) for file in files]
        return "## Use\n\n```bash\n" + "\n".join(lines) + "\n```"
    if kind == "lora":
        text = _USE["lora"]
        if origin.task != "causal":
            text = text.replace("CausalLM", "SequenceClassification")
    else:
        text = _USE["label" if origin.task != "causal" else "folder"]
    return f"## Use\n\n```python\n{text.format(folder=name)}\n```"


def _table(names: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines)


def _data(origin: Origin) -> str:
    if not origin.data:
        return ""
    data = origin.data
    rows = [
        ("file", f"`{Path(str(data.get('path'))).name}`"),
        ("SHA-256", f"`{data.get('fingerprint')}`"),
        ("layout", data.get("format")),
    ]
    rows += [
        (name.replace("_", " "), f"{n:,}")
        for name, n in data.get("counts", {}).items()
        if isinstance(n, int)
    ]
    rows += [
        (f"held out: {name}", f"{n:,}")
        for name, n in (data.get("eval_counts") or {}).items()
        if isinstance(n, int)
    ]
    return "## Data\n\n" + _table(("", ""), [row for row in rows if row[1]])


def _settings(settings: TrainConfig | None) -> str:
    """The settings that were not left at their default, and the ones that everybody asks for."""
    if settings is None:
        return ""
    always = {"method", "learning_rate", "num_train_epochs", "max_steps", "r", "lora_alpha", "seed"}
    fields = type(settings).model_fields
    rows = []
    for name in fields:
        value = getattr(settings, name)
        shown = name in always or value != fields[name].default
        if name not in _PLACES and shown and value not in (None, {}, []):
            rows.append((f"`{name}`", value))
    return "## Settings\n\n" + _table(("setting", "value"), rows)


def _measures(metrics: dict[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return "## Measures\n\n" + _table(("measure", "value"), rows) if rows else ""


def _verification(reports: Sequence[Report]) -> str:
    if not reports:
        return "## Verification\n\nNot verified."
    lines = ["## Verification", ""]
    for report in reports:
        name = report.artefact.name
        if report.missing:
            lines += [f"`{name}`: **not verified**, {report.missing}.", ""]
            continue
        said = "passed" if report.verified else f"**failed**: {report.cause}"
        lines += [f"`{name}` ({report.format}), compared on {report.rows}: {said}", ""]
        rows = [
            (c.name, _number(c.value), _number(c.tolerance), "yes" if c.ok else "**no**")
            for c in report.checks
        ]
        lines += [_table(("check", "difference", "allowed", "passed"), rows), ""]
    return "\n".join(lines).rstrip()


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "cannot be compared"
