"""``finegraft quickstart``: the whole way once, in minutes, with numbers at the end.

What: the demo model learns to speak like Yoda from 660 rows and is examined on 60 that it has not
seen. How: it composes what the other commands use: rows on the disk, ``training.run.train``,
``inference.generate`` and ``inference.score``. Constraint: "before" is the same model with its
adapter switched off, so both columns come from the same code, weights and precision. Trade-off:
"before" is therefore measured after training, which saves loading the model twice.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from finegraft.cli.help import Help
from finegraft.cli.output import Output, quiet_libraries
from finegraft.cli.progress import clock
from finegraft.cli.train import finish, run_training
from finegraft.core.paths import require_writable, write_whole
from finegraft.core.schema import TrainConfig, build

ROWS, HELD_OUT = 720, 60
EXAMPLES = 5
MAX_LENGTH = 128
ANSWER_TOKENS = 40  # the longest right answer has 30
ANSWER_BATCH = 30
SETTINGS: dict[str, Any] = {
    "model": "demo",
    "max_length": MAX_LENGTH,
    "r": 16,
    "lora_alpha": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
}
WIDEST_CELL = 90


@dataclass(frozen=True)
class Exam:
    """What the model said to the held-out rows, and how good that was."""

    texts: list[str]
    exact_match: float
    loss: float


def free_folder(wanted: Path) -> Path:
    """Return ``wanted``, or ``wanted-2``, ``wanted-3``, ... where something is there already."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def write_rows(folder: Path) -> tuple[Path, Path, list[dict[str, str]]]:
    """Write the two data files beside the run and return them with the held-out rows.

    They are the same for every quickstart, so runs beside one another share them.
    """
    from finegraft.data import yoda

    require_writable(folder)
    train_rows, heldout = yoda.split(yoda.rows(ROWS), heldout=HELD_OUT)
    files = folder / "yoda-train.jsonl", folder / "yoda-heldout.jsonl"
    for path, rows in zip(files, (train_rows, heldout), strict=True):
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return *files, heldout


def examine(model: Any, tokenizer: Any, heldout: list[dict[str, str]]) -> Exam:
    """Answer the held-out rows and score them."""
    from finegraft.data.prepare import prepare
    from finegraft.data.rows import conversations, detect
    from finegraft.inference.generate import complete
    from finegraft.inference.score import exact_match, heldout_loss

    talks = conversations(heldout, detect(heldout)[1])
    rows = prepare(talks, tokenizer, max_length=MAX_LENGTH)
    texts = complete(
        model,
        tokenizer,
        [talk[:-1] for talk in talks],
        max_new_tokens=ANSWER_TOKENS,
        batch_size=ANSWER_BATCH,
    )
    return Exam(
        texts,
        exact_match(texts, [row["completion"] for row in heldout]),
        heldout_loss(model, rows.input_ids, rows.labels, batch_size=ANSWER_BATCH),
    )


def settings(folder: Path, data: Path, steps: int | None, overwrite: bool) -> TrainConfig:
    """The configuration of the run."""
    values = {**SETTINGS, "data": str(data), "output": str(folder), "overwrite": overwrite}
    if steps is not None:
        values["max_steps"] = steps
    return build(values, "quickstart")


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDEST_CELL else line[:WIDEST_CELL] + "..."


def _show(
    values: dict[str, Any], heldout: list[dict[str, str]], before: Exam, after: Exam, to: Console
) -> None:
    examples = Table(title="Sentences it has not seen", title_justify="left", show_lines=True)
    for name in ("you say", "before", "after"):
        examples.add_column(name, ratio=1, overflow="fold")
    step = len(heldout) // EXAMPLES + 1  # patterns take turns by six; a step of 13 meets five
    for i in range(0, len(heldout), step):
        row = heldout[i]
        right = after.texts[i].strip() == row["completion"].strip()
        style = "green" if right else ""
        cells = (row["prompt"], before.texts[i], after.texts[i])
        examples.add_row(*(_cell(cell) for cell in cells), style=style)
    to.print(examples)
    scores = Table(box=None, pad_edge=False)
    for name in (f"on {len(heldout)} held-out rows", "before", "after"):
        scores.add_column(name)
    scores.add_row("exactly right", f"{before.exact_match:.0%}", f"{after.exact_match:.0%}")
    scores.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    to.print(scores)
    run = shlex.quote(values["run"])
    took = f"{clock(values['seconds'])}, {clock(values['training_seconds'])} of it training"
    for words, style in (
        (f"\nTook {took}. Saved in {values['run']}.", ""),
        ("\nNext:", ""),
        (f"  finegraft chat {run}", "bold"),
        (f'  finegraft generate {run} "{heldout[0]["prompt"]}"', "bold"),
        ("  finegraft train --model demo --data YOUR_ROWS.jsonl --output runs/mine", "bold"),
    ):
        to.print(words, style=style, markup=False, highlight=False, soft_wrap=True)


def _report(folder: Path, values: dict[str, Any], rows: list[dict[str, str]], *exams: Exam) -> None:
    """Keep every answer in the run's report folder."""
    (folder / "report").mkdir(exist_ok=True)
    before, after = (exam.texts for exam in exams)
    answers = [
        {**row, "before": was, "after": now}
        for row, was, now in zip(rows, before, after, strict=True)
    ]
    text = json.dumps({**values, "answers": answers}, ensure_ascii=False, indent=1)
    write_whole(folder / "report" / "quickstart.json", text + "\n")


def quickstart(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The run folder.")] = Path(
        "runs/quickstart"
    ),
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, metavar="INT", help="Steps to stop after."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", "--fresh", help="Replace the run folder if it exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Teach a small model to speak like Yoda, and see that it learnt."""
    out: Output = ctx.obj
    began = time.perf_counter()
    folder = output if overwrite else free_folder(output)
    if folder != output:
        out.note(f"{output} exists, so this run goes to {folder} (--overwrite replaces it)")
    train_file, _, heldout = write_rows(folder.parent / "data")
    result = run_training(out, settings(folder, train_file, steps, overwrite))
    if result.interrupted:
        finish(out, result)
    with out.busy("examining it on sentences it has not seen"), quiet_libraries():
        with result.model.disable_adapter():
            before = examine(result.model, result.tokenizer, heldout)
        after = examine(result.model, result.tokenizer, heldout)
    values = {
        "exact_match_before": before.exact_match,
        "exact_match_after": after.exact_match,
        "heldout_loss_before": before.loss,
        "heldout_loss_after": after.loss,
        "seconds": time.perf_counter() - began,
        "training_seconds": result.seconds,
        "run": str(result.run),
    }
    _report(Path(result.run), values, heldout, before, after)
    out.result(values, lambda to: _show(values, heldout, before, after, to))


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(quickstart)
