"""The result of a verification, and the mark that it leaves beside the export.

What: a ``Report`` of checks, with tolerances by format; ``mark`` writes ``verification.json``. How:
one object for a folder; for GGUF files one object a file under ``files``. Constraint: ``verified``
is true only where every check was made and passed. Trade-off: tolerances are stated for chat models
of 100M parameters and more in 16 bits; very small random models stay far below them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finegraft.core.paths import write_whole
from finegraft.export._contract import Check

FILE = "verification.json"


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that pass.

    Attributes:
        log_probs: Mean over the tokens of a row, then over the rows, in nats.
        adapter: Of the adapter's share in the answers, which is 1.
        perplexity: Relative, over some hundred tokens: on so few Q8_0 measured 8% after a short
            training with large steps, where a long text gives below 1%.
    """

    log_probs: float
    adapter: float
    perplexity: float


_HALF = Tolerance(0.06, 0.1, 0.02)
_FOUR = Tolerance(1.0, 0.35, 0.25)
TOLERANCES = {
    # of other methods than LoRA, updates below half a step of a bfloat16 weight are lost
    "merged_16bit": Tolerance(0.2, 0.15, 0.15),
    "lora": _HALF,
    "merged_4bit": Tolerance(1.0, 0.5, 0.6),
    "gguf:f32": _HALF,
    "gguf:f16": _HALF,
    "gguf:bf16": _HALF,
    "gguf:q8_0": Tolerance(0.15, 0.12, 0.12),
    "gguf:q6_k": Tolerance(0.2, 0.15, 0.15),
    "gguf:q5_k_m": Tolerance(0.35, 0.25, 0.2),
    "gguf:q5_k_s": Tolerance(0.35, 0.25, 0.2),
    "gguf:q5_0": Tolerance(0.35, 0.25, 0.2),
    "gguf:q5_1": Tolerance(0.35, 0.25, 0.2),
    "gguf:q4_k_m": _FOUR,
    "gguf:q4_k_s": _FOUR,
    "gguf:q4_0": _FOUR,
    "gguf:q4_1": _FOUR,
    "gguf:q3_k_m": Tolerance(1.5, 0.6, 0.6),
    "gguf:q2_k": Tolerance(2.5, 0.8, 2.0),
}
# What an adapter changes is compared where it is more than this many times that of log_probs.
VISIBLE = 0.5


@dataclass(frozen=True)
class Report:
    """What was compared and what came out.

    Attributes:
        artefact: The folder or file.
        format: ``merged_16bit``, ``lora``, ``gguf:q8_0``, ...
        against: What it was compared with.
        rows: Where the conversations are from.
        checks: In the order in which they were made.
        cause: What is wrong, or None.
        worst: The prompt with the largest difference.
        missing: Why nothing could be compared, or None.
    """

    artefact: Path
    format: str
    against: str
    rows: str = ""
    checks: tuple[Check, ...] = field(default_factory=tuple)
    cause: str | None = None
    worst: str | None = None
    missing: str | None = None

    @property
    def verified(self) -> bool:
        """Whether everything was compared and agreed."""
        return bool(self.checks) and self.missing is None and all(c.ok for c in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it; a number that is not finite becomes null."""
        checks = [
            {
                "name": check.name,
                "value": check.value if abs(check.value) < float("inf") else None,
                "tolerance": check.tolerance,
                "ok": check.ok,
            }
            for check in self.checks
        ]
        return {
            "verified": self.verified,
            "format": self.format,
            "checks": checks,
            "cause": self.cause or self.missing,
            "worst_prompt": self.worst,
            "against": self.against,
            "rows": self.rows,
        }


def mark(report: Report) -> Path:
    """Write the report beside what it is about, and return the file."""
    values = report.as_dict()
    if report.artefact.is_dir():
        file = report.artefact / FILE
    else:
        file = report.artefact.parent / FILE
        files = {**read(file).get("files", {}), report.artefact.name: values}
        files = {n: v for n, v in files.items() if (file.parent / n).is_file()}
        verified = all(v["verified"] for v in files.values())
        values = {"verified": verified, "format": "gguf", "files": files}
    write_whole(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return file


def read(file: Path) -> dict[str, Any]:
    """What a mark says; empty without one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def noted_source(artefact: Path) -> str | None:
    """What an earlier report of this export was compared with."""
    folder = artefact if artefact.is_dir() else artefact.parent
    values = read(folder / FILE)
    if not artefact.is_dir():
        values = values.get("files", {}).get(artefact.name, {})
    found = values.get("against")
    return str(found) if found else None
