"""``finegraft data check``: what is wrong with which rows, before a model learns it.

What: the audit of ``data.audit`` with a verdict, row numbers, an HTML report and a cleaned copy.
How: large files are read by two processes; with --model the rows are tokenised too. Constraint: the
source is never changed, and no file of rows is overwritten. Exit status 1 says ``do not train``, so
that a script can stop there. Trade-off: a cleaned copy costs one more pass over the rows.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from finegraft.cli.data import group, settings_of
from finegraft.cli.flags import _mapping
from finegraft.cli.help import Help
from finegraft.cli.output import Output, only_warnings, quiet_libraries
from finegraft.core.errors import DataError

STATUS_DO_NOT_TRAIN = 1
PROGRESS_AFTER_SECONDS = 2.0
_TWO_PROCESSES_BYTES = 50_000_000  # a second process takes 0.5 s to start
_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
_SHOWN_DETAILS = 2


def check(
    ctx: typer.Context,
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Rows, or a YAML file of settings.")
    ],
    eval_data: Annotated[
        str | None,
        typer.Option("--eval-data", metavar="FILE", help="Held-out rows, to look for leaks."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="TEXT", help="Count this model's tokens too.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", metavar="INT", help="Longest row, in tokens.")
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="WANTED=FOUND", help="Columns to rename."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TEXT", help="causal or classification; unset: by columns."),
    ] = None,
    near: Annotated[
        bool, typer.Option("--near/--no-near", help="Look for near duplicates.")
    ] = True,
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT.jsonl", help="Write a cleaned copy.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="OUT.html", help="Write a page with charts.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="INT", help="1 or 2; unset: by size.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for faults in rows: duplicates, leaks, secrets, damage, cut answers.

    Exit status: 0 good or worth a look, 1 do not train, 2 it could not be read.

    For example:

      finegraft data check rows.jsonl --model demo --report check.html
    """
    settings = settings_of(
        data,
        eval_data=eval_data,
        model=model,
        max_length=max_length,
        map=_mapping(mapping) if mapping else None,
        task=task,
    )
    out: Output = ctx.obj
    _require(settings.get("task"), report)
    found, written = _run(settings, out, near=near, fix=fix, processes=processes)
    if report is not None:
        _write_page(found, report)
    result = found.as_dict()
    result["fixed"] = written and {
        "path": written.path,
        "changes": written.record,
        "kept": written.kept,
        "changed": written.changed,
        "removed": written.removed,
    }
    result["report"] = report
    out.result(result, lambda to: _show(to, found, written, report))
    if found.verdict == "do not train":
        raise typer.Exit(STATUS_DO_NOT_TRAIN)


def _require(task: str | None, report: Path | None) -> None:
    """What can be known before reading.

    Raises:
        DataError: FG-DATA-052 a report that is not named .html, FG-DATA-053 an unknown task.
    """
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise DataError(
            "FG-DATA-052",
            f"--report {report} is not the name of a page",
            allowed="a name that ends in .html; a page of that name is replaced",
            fix=f"--report {report.with_suffix('.html')}",
        )
    if task not in (None, "causal", "classification"):
        raise DataError(
            "FG-DATA-053",
            f"--task {task}, whose rows this command does not know",
            allowed="causal, classification",
            fix="leave --task away, or check the texts alone: --task causal --map text=<column>",
        )


def _run(
    settings: dict[str, Any], out: Output, *, near: bool, fix: Path | None, processes: int | None
) -> tuple[Any, Any]:
    from finegraft.data.audit import audit
    from finegraft.data.audit import fix as fixing

    if fix is not None:
        fixing.targets(fix)
    with quiet_libraries(), only_warnings():
        tokenizer = _tokenizer(settings) if settings.get("model") else None
    source = settings["data"]
    with _counting(out) as progress:
        found = audit(
            source,
            held_out=settings.get("eval_data"),
            mapping=settings["map"],
            task=settings.get("task"),
            tokenizer=tokenizer,
            max_length=settings["max_length"],
            completion_only=settings["completion_only_loss"],
            near=near,
            processes=processes or _processes(source),
            progress=progress,
        )
    written = None
    if fix is not None:
        with out.busy("writing the cleaned rows"):
            written = fixing.write(found, source, fix, settings["map"])
    return found, written


def _tokenizer(settings: dict[str, Any]) -> Any:
    from finegraft import opening
    from finegraft.data.chat_templates import get_chat_template
    from finegraft.models.locate import locate

    located = locate(settings["model"], revision=settings["revision"])
    tokenizer = opening.open_tokenizer(located, max_seq_length=settings["max_length"])
    template = settings["chat_template"]
    return get_chat_template(tokenizer, template) if template else tokenizer


def _processes(source: Any) -> int:
    names = [source] if isinstance(source, str) else source
    sizes = [Path(n).stat().st_size for n in names if isinstance(n, str) and Path(n).is_file()]
    return 2 if sum(sizes) > _TWO_PROCESSES_BYTES and (os.cpu_count() or 1) > 1 else 1


@contextlib.contextmanager
def _counting(out: Output) -> Iterator[Callable[[int], None]]:
    """Yield what draws the rows done, in a terminal and once two seconds have passed."""
    columns = (SpinnerColumn(), TextColumn("checking rows"), MofNCompleteColumn())
    bar = Progress(*columns, console=out.err, transient=True)
    task, begun = bar.add_task("", total=None), time.monotonic()

    def show(done: int) -> None:
        if out.err.is_terminal and time.monotonic() - begun >= PROGRESS_AFTER_SECONDS:
            bar.start()
        bar.update(task, completed=done)

    try:
        yield show
    finally:
        if bar.live.is_started:  # stopping one that never began prints an empty line
            bar.stop()


def _write_page(found: Any, path: Path) -> None:
    from finegraft.core.paths import storage_error
    from finegraft.data.audit.page import html

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html(found), encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from error


def _show(to: Console, found: Any, written: Any, report: Path | None) -> None:
    style = {"good": "bold green", "look at these": "bold yellow"}.get(found.verdict, "bold red")
    to.print(Text.assemble((found.verdict, style), f": {found.source}, {_sums(found)}"))
    for finding in found.findings:
        _finding(to, finding)
    if not found.near:
        to.print(Text("near duplicates were not looked for (--no-near)", style="dim"))
    if written is not None:
        words = f"{written.kept:,} rows in {written.path} ({written.changed:,} changed); "
        words += f"{written.removed:,} removed. What and why: {written.record}"
        to.print(Text(words), soft_wrap=True)
    elif any(f.check.fix for f in found.findings):
        to.print(Text("--fix OUT.jsonl writes a copy without what can be mended", style="dim"))
    if report is not None:
        to.print(Text(f"report: {report}"), soft_wrap=True)


def _sums(found: Any) -> str:
    words = f"{found.rows:,} rows, layout {found.layout}"
    counted = found.tokens
    if counted is not None and counted.lengths:
        about = "about " if counted.sampled else ""
        words += f", {about}{counted.total(counted.lengths):,} tokens, {about}"
        words += f"{found.trained_tokens:,} of them trained"
        if counted.sampled:
            words += f" (from {counted.measured:,} rows)"
    return words


def _finding(to: Console, finding: Any) -> None:
    check = finding.check
    to.print(
        Text.assemble(
            (f"{check.severity} ", _STYLES[check.severity]),
            finding.message,
            (f" {check.code}", "dim"),
        )
    )
    lines = [f"row {row:,}: {words}" for row, words in finding.details.items() if words]
    lines = [*lines[:_SHOWN_DETAILS], check.cure]
    to.print(Padding(Text("\n".join(lines), style="dim"), (0, 0, 0, 4)))


def register(app: typer.Typer) -> None:
    """Add the command to the group ``finegraft data``, which ``cli.data`` adds to ``app``."""
    group.command("check", cls=Help)(check)
