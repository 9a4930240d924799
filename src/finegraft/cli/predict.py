"""``finegraft predict``: labels and probabilities of texts, or of the spans in them.

What: texts from the command line, a file of rows or lines, or standard input, answered by
``FastClassifier``. How: structured files are read as for training, their text column found by name.
Constraint: results keep the order of the texts; ``--output`` appears complete or not at all.
Trade-off: standard input is read to its end before the first answer.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finegraft.cli.help import Help
from finegraft.cli.output import Output, only_warnings, quiet_libraries
from finegraft.core.errors import DataError, ModelError
from finegraft.core.paths import require_writable, write_whole

PROGRESS_AFTER_SECONDS = 2.0
_LIKELIEST = 3  # labels shown beside the first one


@dataclass(frozen=True)
class _Texts:
    texts: list[str]
    pairs: list[str] | None = None


def _texts(
    words: list[str], file: Path | None, column: str | None, pair_column: str | None
) -> _Texts:
    """Texts of the command line, then those of the file or of standard input.

    Raises:
        DataError: FG-CLASS-024, no text at all or a file that cannot be read; those of reading.
    """
    if file is None and not words and not sys.stdin.isatty():
        file = Path("-")
    found, pairs = list(words), None
    if file is not None and str(file) != "-":
        from finegraft.data import labels
        from finegraft.data.sources import read_rows

        rows = read_rows(file)
        text, pair = labels.text_columns(list(rows[0]), column, pair_column)
        found += labels.texts_of(rows, text, str(file))
        if pair and not words:
            pairs = labels.texts_of(rows, pair, str(file))
    elif file is not None:
        found += [line.strip() for line in sys.stdin if line.strip()]
    if not found:
        raise DataError(
            "FG-CLASS-024",
            "there is no text",
            allowed="texts in quotes, --file ROWS.jsonl (or csv, txt ...), or lines on standard "
            "input",
            fix='finegraft predict MODEL "your text"',
        )
    return _Texts(found, pairs)


def _require_classifier(name: str) -> None:
    """Find the model before anything heavy is loaded.

    Raises:
        ModelError: FG-CLASS-025, a model that generates text; FG-CLASS-026, one without a
            trained head.
    """
    from finegraft.models import classifier
    from finegraft.models.locate import locate

    kind = classifier.kind_of(locate(name))
    if kind == classifier.CAUSAL:
        raise ModelError(
            "FG-CLASS-025",
            f"{name} generates text and has no labels",
            allowed="a run or adapter of `finegraft train --task classification`, or a classifier",
            fix=f'finegraft generate {name} "your question"',
        )
    if kind not in (classifier.SEQUENCE, classifier.TOKEN):
        raise ModelError(
            "FG-CLASS-026",
            f"{name} has no trained head that classifies texts",
            allowed="a run or adapter of `finegraft train --task classification`, or a classifier",
            fix=f"finegraft train --task classification --model {name} --data ROWS.jsonl",
        )


@contextlib.contextmanager
def _bar(out: Output, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield what draws progress, in a terminal and once two seconds have passed."""
    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=out.err, transient=True)
    task, started = bar.add_task("", total=total), time.monotonic()

    def show(done: int, of: int) -> None:
        if out.err.is_terminal and time.monotonic() - started >= PROGRESS_AFTER_SECONDS:
            bar.start()
        bar.update(task, completed=done)

    try:
        yield show
    finally:
        bar.stop()


def _spans(said: list[Any]) -> Table:
    """One line a span: its type, its probability, its words, and the text that it stands in."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("label", "probability", "found", "text"):
        right = title == "probability"
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for one in said:
        text = Text(one.text)
        for found in one.entities:
            label, words = Text(found.label, style="bold"), Text(found.text)
            table.add_row(label, f"{found.probability:.3f}", words, text)
            text = Text("")  # shown once
        if not one.entities:
            table.add_row(Text("(none)", "dim"), "", "", text)
    return table


def _table(said: list[Any]) -> Table:
    """One line a text: the label, its probability, the next likeliest, the text."""
    if hasattr(said[0], "entities"):
        return _spans(said)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    values = said[0].value is not None
    for title in ("value",) if values else ("label", "probability", "others"):
        table.add_column(title, justify="right" if title in ("value", "probability") else "left")
    table.add_column("text", overflow="fold")
    for one in said:
        text = one.text if one.text_pair is None else f"{one.text} | {one.text_pair}"
        if values:
            table.add_row(f"{one.value:.4f}", Text(text))
            continue
        chosen = one.label if isinstance(one.label, list) else [one.label]
        rest = sorted(one.probabilities.items(), key=lambda item: -item[1])
        others = [f"{name} {p:.3f}" for name, p in rest if name not in chosen][:_LIKELIEST]
        label = Text(", ".join(chosen) or "(none)", style="bold")
        table.add_row(label, f"{one.probability:.3f}", Text(", ".join(others), "dim"), Text(text))
    return table


def _show(said: list[Any], written: Path | None, to: Console) -> None:
    if written is None:
        to.print(_table(said))
    else:
        to.print(f"{len(said):,} texts, written to {written}", markup=False, soft_wrap=True)


def predict(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run, adapter or model folder, or a hub name.")
    ],
    text: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="What to classify.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Rows (jsonl, csv ...) or lines (txt); - is stdin."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write JSON lines there.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", metavar="NAME", help="Unset: found by name.")
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option("--text-pair-column", metavar="NAME", help="Second text of pairs.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="INT", help="Texts at a time.")
    ] = 32,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="NUMBER",
            help="To say one of several labels (unset: 0.5) or a span (unset: any).",
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantize the base while loading.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Label texts with a classifier that `finegraft train` made.

    A model of --task token_classification finds the spans in them.
    For example:

      finegraft predict runs/reviews "It was good."
    """
    out: Output = ctx.obj
    asked = _texts(text or [], file, text_column, text_pair_column)
    if output is not None:
        require_writable(output.absolute().parent)
    with out.busy(f"loading {model}"), quiet_libraries(), only_warnings():
        _require_classifier(model)
        from finegraft.classifier import FastClassifier

        loaded, tokenizer = FastClassifier.from_pretrained(
            model, load_in_4bit=load_in_4bit, trust_remote_code=trust_remote_code
        )
    with quiet_libraries(), _bar(out, len(asked.texts)) as show:
        said = FastClassifier.predict(
            loaded,
            tokenizer,
            asked.texts,
            pairs=asked.pairs,
            batch_size=batch_size,
            threshold=threshold,
            on_progress=show,
        )
    rows = [one.as_dict() for one in said]
    if output is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_whole(output, "".join(lines))
    out.result({"model": model, "predictions": rows}, lambda to: _show(said, output, to))


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(predict)
