"""Rows of a file as training sees them, for the page.

What: ``Looks.look`` gives some rows, what is trained of each, and the columns. How: ``data.show``,
which ``finegraft data show`` uses too; tokenizers are kept for the next look. Constraint: rows that
cannot be rendered are shown as they are, with the reason. Trade-off: the first look takes seconds,
because transformers is imported for it.
"""

from __future__ import annotations

import itertools
import shlex
import threading
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError
from finegraft.core.schema import default_of
from finegraft.data import sources
from finegraft.ui import replies
from finegraft.ui.workspace import Workspace

MOST_ROWS = 100
_KEPT_TOKENIZERS = 4
_COUNTED_BYTES = 1 << 30
_LINES = (".jsonl", ".ndjson")
_SHOWN_LETTERS = 20_000  # of a row
_MODEL = "demo"


class Looks:
    """Looks at rows, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizers: dict[str, Any] = {}
        self._counts: dict[tuple[str, int, int], int] = {}

    def look(
        self, space: Workspace, name: str, model: str, first: int, count: int, max_length: int
    ) -> dict[str, Any]:
        """Show rows.

        Args:
            name: Of the file.
            model: Whose tokens; empty: the demo's.
            first: Of the rows, from 0.
            count: Rows at most.
            max_length: Tokens of a row; 0: the default.

        Raises:
            ConfigError: FG-UI-005; DataError: what reading says about the file.
        """
        path = space.inside(name)
        data = space.name_of(path)
        model = space.model(model) if model else _MODEL
        count = max(1, min(count, MOST_ROWS))
        longest = max_length or default_of("max_length", "causal")
        raw = list(itertools.islice(sources.iter_rows(data), first, first + count))
        words = ["finegraft", "data", "show", data, "-n", str(count)]
        words += ["--model", model] if model != _MODEL else []
        words += ["--max-length", str(max_length)] if max_length else []
        values = {
            "path": data,
            "model": model,
            "max_length": longest,
            "columns": list(raw[0]) if raw else [],
            "rows_total": self._total(path),
            "from": first,
            "command": shlex.join(words),
        }
        try:
            rows, layout = self._rendered(data, model, first, count, longest)
        except FinegraftError as error:
            plain = [_as_it_is(place, row) for place, row in enumerate(raw, first + 1)]
            told = replies.error_values(error)
            return {**values, "format": None, "rows": plain, "error": told}
        return {**values, "format": layout, "rows": rows, "error": None}

    def _rendered(
        self, data: str, model: str, first: int, count: int, longest: int
    ) -> tuple[list[dict[str, Any]], str]:
        from finegraft.data import show, show_labels

        task = show_labels.task_of(data)
        with self._lock:
            tokenizer = self._tokenizer(model)
            if task != "causal":
                texts = show_labels.rows(data, None, task=task, first=first + 1, count=count)
                told = [_labelled(row, show_labels.shown(row, tokenizer)) for row in texts]
                return told, texts[0].format
            picked = show.rows(data, None, first=first + 1, count=count)
            shown = [(row, show.shown(row, tokenizer, max_length=longest)) for row in picked]
        return [_told(row, its) for row, its in shown], picked[0].format

    def _tokenizer(self, model: str) -> Any:
        if model not in self._tokenizers:
            from finegraft import opening
            from finegraft.models.locate import locate

            while len(self._tokenizers) >= _KEPT_TOKENIZERS:
                self._tokenizers.pop(next(iter(self._tokenizers)))
            self._tokenizers[model] = opening.open_tokenizer(locate(model))
        return self._tokenizers[model]

    def _total(self, path: Path) -> int | None:
        """Rows of a file of lines; None where counting would take long or mean reading it."""
        facts = path.stat() if path.is_file() else None
        if facts is None or path.suffix.lower() not in _LINES or facts.st_size > _COUNTED_BYTES:
            return None
        key = (str(path), facts.st_size, facts.st_mtime_ns)
        if key not in self._counts:
            with open(path, "rb") as lines:
                self._counts[key] = sum(1 for line in lines if line.strip())
        return self._counts[key]


def _told(row: Any, its: Any) -> dict[str, Any]:
    return {
        "place": row.place,
        "source": row.source,
        "spans": [{"text": text[:_SHOWN_LETTERS], "state": state} for state, text in its.parts],
        "tokens": len(its.ids),
        "trained": its.trained,
        "cut": its.cut,
        "dropped": its.dropped,
    }


def _labelled(row: Any, its: Any) -> dict[str, Any]:
    """A text with its label behind it, which is what is trained."""
    told = _told(row, its)
    told["spans"].append({"text": f"\n{row.label}", "state": "trained"})
    return told


def _as_it_is(place: int, row: dict[str, Any]) -> dict[str, Any]:
    text = "\n".join(f"{key}: {value}" for key, value in row.items())
    spans = [{"text": text[:_SHOWN_LETTERS], "state": "read"}]
    return {"place": place, "spans": spans, "tokens": None, "trained": None, "cut": None}
