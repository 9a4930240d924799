"""Put the committed results into docs/benchmarks.md, and the peers' into the README as well.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _report
import cpu_classify
import cpu_decode
import scaling

NOTE = (
    "Written by `python benchmarks/readme.py` from `benchmarks/results`. What bounds what, and "
    "what was tried without success, is in [lab-notes.md](lab-notes.md)."
)
ROOT = Path(__file__).parents[1]
# Names of results and the function that puts each in words; training runs share one.
TABLES = {
    "cpu_classify": cpu_classify.table,
    "cpu_decode": cpu_decode.table,
    "scaling": scaling.table,
}
# Too long for the README.
ONLY_IN_DOCS = ("scaling", "cpu_sft_1024", "cpu_sft_4bit")
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"


def section(leave_out: tuple[str, ...] = ()) -> str:
    """All committed results as Markdown, with the commands that made them."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"), key=_order):
        if path.stem in leave_out:
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        words = TABLES.get(path.stem, _report.table)
        machine = "" if words is _report.table else f"\n\n({_report.where(result)})"
        parts.append(f"`{result['command']}`:\n\n{words(result)}{machine}")
    return "\n\n".join(parts)


def _order(path: Path) -> tuple[bool, str]:
    """Training first, then by name."""
    return not path.stem.startswith("cpu_sft"), path.stem


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    short = section(leave_out=ONLY_IN_DOCS)
    readme.write_text(f"{before}{START}\n{short}\n{END}{after}", encoding="utf-8")
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text(f"# Measured\n\n{NOTE}\n\n{section()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
