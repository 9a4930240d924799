"""The lines of ``events.jsonl``, read without anything heavy.

What: ``read_events`` and ``by_step`` for everything that shows a run, ``heal`` for who appends.
How: a line that is not whole JSON is skipped. Constraint: a kill or a full disk may cut the last
line; what is appended afterwards must not be glued to it. Trade-off: a cut line stays in the file,
because the file is only ever appended to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run, skipping lines that a kill has cut."""
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # cut, perhaps inside a character
            continue
        if isinstance(event, dict) and "type" in event:
            events.append(event)
    return events


def by_step(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return one event of ``kind`` a step: the last, because a resumed run tells steps again."""
    return list({event["step"]: event for event in events if event["type"] == kind}.values())


def heal(path: Path) -> None:
    """End a last line that was cut, so that the next one begins on a line of its own."""
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb+") as lines:
        lines.seek(-1, 2)
        if lines.read(1) != b"\n":
            lines.write(b"\n")
