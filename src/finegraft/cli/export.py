"""``finegraft merge``, ``finegraft export``, ``finegraft verify`` and ``finegraft push``.

What: a run or model in the formats that others run, the proof that it is what was trained, and its
upload. How: ``export._save`` writes and verifies, ``export._push`` uploads; events become lines on
stderr, the result a table. Constraint: an export that fails its verification leaves with status 1
and is not uploaded. Trade-off: pushing is a command of its own beside ``export --push``, because
what broke must go on without exporting again.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finegraft.cli.help import Help
from finegraft.cli.output import Output, Stopped, quiet_libraries
from finegraft.cli.progress import size

STATUS_UNVERIFIED = 1

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Where = Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not reload it and compare it with what was trained.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="bfloat16 or float16; unset, as the base has it."),
]
Source = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run, adapter or model folder, or a hub name.")
]


Push = Annotated[
    str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to the model hub.")
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository a private one, if it is new.")
]


def _run(
    out: Output,
    source: str,
    output: Path,
    to: str,
    verify: bool,
    options: dict[str, Any],
    push: dict[str, Any] | None = None,
) -> None:
    """Export with progress on stderr, show the result, leave with 1 if it is not what it was."""
    with out.busy("starting"), quiet_libraries():
        from finegraft.export import _push, _save

        target = None
        if push:
            names = list(_save.parse(to))
            if len(names) > 1:
                raise _push.several(str(output), [name.replace("_", "-") for name in names])
            target = _push.open_target(**push)

    def tell(event: dict[str, Any]) -> None:
        if event["type"] == "phase":
            out.note(f"{event['name']} ...")
        elif event["type"] == "written":
            out.note(f"wrote {event['path']}, {size(event['bytes'])} in {event['seconds']} s")

    with quiet_libraries():
        done = _save.export(
            source,
            output,
            to,
            verify=verify,
            listener=tell,
            options=options,
            repo=target.repo if target else None,
        )
    values = {
        "source": source,
        "exports": [
            {"format": one.format, "path": one.path, "bytes": one.bytes, **_told(one.report)}
            for one in done
        ],
        "verified": all(one.verified for one in done),
    }
    failed = any(not one.verified and one.report.missing is None for one in done)
    pushed = None
    if target and not failed:
        folder = done[0].path if done[0].path.is_dir() else done[0].path.parent
        what = _push.plan(folder, verified=verify, only=done[0].files)
        pushed = _upload(out, target, what)
        values["pushed"] = _values(pushed)
    out.result(values, lambda to: _show(done, to, pushed))
    if failed:
        raise typer.Exit(STATUS_UNVERIFIED)


def _upload(out: Output, target: Any, what: Any) -> Any:
    """Upload with the list of files before and a line for each that has arrived."""
    from finegraft.export import _push

    def tell(event: dict[str, Any]) -> None:
        if event["type"] == "uploading":
            kind = "private" if target.private else "public, unless its owner's default is private"
            out.note(f"uploading {size(event['bytes'])} to {event['repo']} (a new one is {kind}):")
            for name, count in event["files"].items():
                out.note(f"  {name}  {size(count)}")
        elif event["type"] == "sent":
            names = event["names"]
            what = names[0] if len(names) == 1 else f"{len(names)} small files"
            done = f"{size(event['bytes'])} of {size(event['of'])}"
            out.note(f"sent {what} in {event['seconds']} s, {done}")

    try:
        return _push.upload(target, what, listener=tell)
    except KeyboardInterrupt:
        raise Stopped(fix=shlex.join(["finegraft", "push", str(what.path), target.repo])) from None


def _values(pushed: Any) -> dict[str, Any]:
    return {
        "repo": pushed.repo,
        "url": pushed.url,
        "commit": pushed.commit,
        "files": list(pushed.files),
        "bytes": pushed.bytes,
        "pull_request": pushed.request,
    }


def _told(report: Any) -> dict[str, Any]:
    values = report.as_dict()
    return {name: values[name] for name in ("verified", "checks", "cause")}


def _show(done: list[Any], to: Console, pushed: Any = None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("format", "size", "verified", "path"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for one in done:
        table.add_row(one.format, size(one.bytes), _word(one.report), str(one.path))
    to.print(table)
    for one in done:
        if not one.verified:
            _explain(one.report, to)
    if pushed:
        _show_pushed(pushed, to)
    to.print("\nNext:")
    for line in dict.fromkeys(_next(one) for one in done):
        to.print(f"  {line}", style="bold", markup=False, soft_wrap=True)


def _show_pushed(pushed: Any, to: Console) -> None:
    words = f"{len(pushed.files)} files, {size(pushed.bytes)}, are in {pushed.url}"
    to.print(words, markup=False, soft_wrap=True)
    if pushed.request:
        to.print(f"pull request: {pushed.request}", markup=False, soft_wrap=True)


def _word(report: Any) -> Text:
    if report.verified:
        return Text("yes", style="green")
    return Text("no", style="yellow") if report.missing else Text("FAILED", style="bold red")


def _explain(report: Any, to: Console) -> None:
    words = (
        f"{report.artefact.name} was not verified: {report.missing}"
        if report.missing
        else f"{report.artefact.name} is not what was trained: {report.cause}"
    )
    to.print(words, style="yellow" if report.missing else "bold red", markup=False, soft_wrap=True)


def _next(one: Any) -> str:
    """What to type with an export."""
    if one.format.startswith("ollama:"):
        file = shlex.quote(str(one.path.parent / "Modelfile"))
        return f"ollama create {shlex.quote(one.path.stem.lower())} -f {file}"
    if one.format.startswith("vllm:"):
        return shlex.quote(str(one.path / "serve.sh"))
    path = shlex.quote(str(one.path))
    if one.format.startswith("gguf_lora:"):
        return f"llama-server -m BASE.gguf --lora {path}"
    return f'finegraft generate {path} "your question"'


def merge(
    ctx: typer.Context,
    run: Source,
    output: Where,
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file.")
    ] = "5GB",
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Write a run as one 16-bit model, its adapter merged in.

    For example:

      finegraft merge runs/first --output merged
    """
    options = {"dtype": dtype, "max_shard_size": max_shard_size}
    options = {name: value for name, value in options.items() if value is not None}
    _run(ctx.obj, run, output, "merged_16bit", not no_verify, options)


def export(
    ctx: typer.Context,
    source: Source,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMATS", help="gguf:q4_k_m, merged-16bit, lora, ...; commas."
        ),
    ],
    output: Where,
    dtype: Dtype = None,
    ollama_base: Annotated[
        str | None,
        typer.Option("--ollama-base", metavar="NAME", help="Ollama's base, for ollama:adapter."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also", metavar="NAME=RUN", help="Another adapter of its base, for vllm:adapter."
        ),
    ] = None,
    push: Push = None,
    private: Private = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Write a run or model in several formats, each of them verified.

    For example:

      finegraft export runs/first --to gguf:q4_k_m,gguf:q8_0 --output gguf
    """
    options = {"dtype": dtype, "base": ollama_base, "also": _adapters(also or []) or None}
    options = {name: value for name, value in options.items() if value is not None}
    upload = {"repo": push, "private": private or None} if push else None
    _run(ctx.obj, source, output, to, not no_verify, options, upload)


def _adapters(pairs: list[str]) -> dict[str, str]:
    """Read ``--also``: names and the folders of adapters."""
    from finegraft.core.errors import ExportError

    found: dict[str, str] = {}
    for pair in pairs:
        name, _, place = pair.partition("=")
        if not name or not place or name in found:
            raise ExportError(
                "FG-EXPORT-076",
                f"--also got {pair!r}" + (" after another of that name" if name in found else ""),
                allowed="NAME=RUN, each name once",
                fix="for example --also french=runs/french",
            )
        found[name] = place
    return found


def push(
    ctx: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(metavar="EXPORT", help="A folder that an export made, or a .gguf in it."),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where it is missing.")
    ],
    private: Private = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="A branch that is there.")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Ask to take it, instead of committing.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Of the commit.")
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Upload what was not proven to be what was trained.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload an export to a model hub.

    Typed again, it goes on where it broke.

    For example:

      finegraft push gguf owner/first-gguf --private
    """
    out: Output = ctx.obj
    with out.busy("looking at the export"), quiet_libraries():
        from finegraft.export import _push

        what = _push.plan(path, verified=not no_verify)
        target = _push.open_target(
            repo,
            private=private or None,
            revision=revision,
            create_pr=pull_request or None,
            message=message,
        )
    with quiet_libraries():
        pushed = _upload(out, target, what)
    out.result(_values(pushed), lambda to: _show_pushed(pushed, to))


def verify(
    ctx: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="A model or adapter folder, or a .gguf file.")
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="RUN|MODEL", help="Unset: what it was exported from."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Reload an export and compare it with what was trained.

    For example:

      finegraft verify gguf/first-Q8_0.gguf --against runs/first
    """
    out: Output = ctx.obj
    with out.busy("verifying"), quiet_libraries():
        from finegraft.export import _verify

        reports = _verify.verify_all(path, against)
    values = reports[0].as_dict()
    if len(reports) > 1:
        causes = [f"{r.artefact.name}: {r.cause or r.missing}" for r in reports if not r.verified]
        values = {
            "verified": not causes,
            "format": ", ".join(r.format for r in reports),
            "checks": [
                {**check, "name": f"{r.artefact.name}: {check['name']}"}
                for r in reports
                for check in r.as_dict()["checks"]
            ],
            "cause": "; ".join(causes) or None,
        }
    out.result(values, lambda to: _show_reports(reports, to))
    if not all(report.verified for report in reports):
        raise typer.Exit(STATUS_UNVERIFIED)


def _show_reports(reports: list[Any], to: Console) -> None:
    for report in reports:
        words = Text.assemble((f"{report.artefact} ({report.format}): "), _verdict(report))
        to.print(words, soft_wrap=True)
        if report.missing:
            to.print(f"  {report.missing}", markup=False, soft_wrap=True)
            continue
        table = Table(box=None, padding=(0, 2, 0, 2), pad_edge=True)
        for title in ("check", "difference", "allowed", ""):
            table.add_column(
                title, justify="right" if title in ("difference", "allowed") else "left"
            )
        for check in report.checks:
            mark = Text("ok", style="green") if check.ok else Text("FAILED", style="bold red")
            value = f"{check.value:.4g}" if abs(check.value) < float("inf") else "none"
            table.add_row(check.name, value, f"{check.tolerance:.4g}", mark)
        to.print(table)
        to.print(
            f"  compared with {report.against} on {report.rows}",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
        if report.cause:
            to.print(f"  cause: {report.cause}", style="bold red", markup=False, soft_wrap=True)
        if report.worst:
            shown = " ".join(report.worst.split())[:70]
            to.print(f"  largest difference: {shown}", style="dim", markup=False, soft_wrap=True)


def _verdict(report: Any) -> tuple[str, str]:
    if report.verified:
        return "verified", "bold green"
    return ("not verified", "bold yellow") if report.missing else ("NOT VERIFIED", "bold red")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (merge, export, verify, push):
        app.command(cls=Help)(command)
