"""The ``finegraft`` command: wiring, and the one place where errors become exit statuses.

What: a typer application whose commands live in the modules beside this one. How: a group class
catches what commands raise; 0 is success, 1 a broken machine or a bug, 2 a mistake that can be put
right, 130 Ctrl-C. Constraint: torch and its friends are imported inside commands, so that
``finegraft --help`` answers in under half a second. Trade-off: an import that fails is noticed when
its command runs, not before; ``finegraft doctor`` looks at all of them.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finegraft.cli import (
    data,
    data_check,
    doctor,
    explain,
    export,
    init,
    ladder,
    models,
    plan,
    predict,
    quickstart,
    resume,
    runs,
    serve,
    sweep,
    talk,
    train,
    ui,
)
from finegraft.cli import eval as evaluate
from finegraft.cli.output import STATUS_ERROR, STATUS_INTERRUPTED, Output, debugging
from finegraft.core.errors import FinegraftError

# BadParameter -> UsageError -> ClickException: newer typer brings its own copy of click and
# exports only the first of these, so the root is reached from there, with either click.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]


def _wants_json(words: Sequence[str]) -> bool:
    words = list(words)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


class Commands(TyperGroup):
    """A group in which every ending has a status and, with ``--json``, one object on stdout."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run one command line and leave with its status."""
        words = list(sys.argv[1:] if args is None else args)
        out = Output(_wants_json(words))
        options["obj"] = out
        if not out.as_json:  # typer's own usage errors, with their box and near names
            with out.claimed():
                return super().main(words, *rest, **options)
        options["standalone_mode"] = False
        with out.claimed():
            try:
                status = super().main(words, *rest, **options)
            except _ClickError as error:
                out.failure(_usage_error(error))
                status = STATUS_ERROR
            except typer.Abort:
                out.interrupted()
                status = STATUS_INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command; deliberate errors and Ctrl-C become messages."""
        try:
            return super().invoke(ctx)
        except FinegraftError as error:
            if debugging():
                raise
            ctx.obj.failure(error)
            raise typer.Exit(STATUS_ERROR) from error
        except KeyboardInterrupt as stop:
            ctx.obj.interrupted(stop)
            raise typer.Exit(STATUS_INTERRUPTED) from None


def _usage_error(error: Any) -> FinegraftError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "finegraft"
    return FinegraftError("FG-CLI-001", error.format_message(), fix=f"{command} --help")


app = typer.Typer(
    name="finegraft",
    cls=Commands,
    help="Fine-tune a language model on your rows, on the computer you have.",
    epilog="First time here? Type: finegraft quickstart",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # every flag works with underscores as well, which is how the schema and trl spell it
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


def _version(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        version = metadata.version("finegraft")
        ctx.obj.result({"version": version}, lambda to: to.print(f"finegraft {version}"))
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    """Set nothing up: every command says itself what it needs."""


for _module in (
    quickstart,
    data,
    data_check,
    init,
    plan,
    train,
    resume,
    ladder,
    sweep,
    talk,
    export,
    serve,
    predict,
    evaluate,
    runs,
    ui,
    models,
    doctor,
    explain,
):
    _module.register(app)


def _bug(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Report what no code here expected, as one message instead of a traceback."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("stopped by Ctrl-C\n")
        return
    place = ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    report = FinegraftError(
        "FG-CLI-004",
        f"unexpected {kind.__name__}: {error} ({place})",
        fix="run the command again with FINEGRAFT_DEBUG=1 set to see where it comes from",
    )
    Output(_wants_json(sys.argv[1:])).failure(report)


def main() -> None:
    """Entry point of the console script. Settings of the whole process are made here only."""
    if not debugging():
        sys.excepthook = _bug
        warnings.simplefilter("ignore")  # other libraries' advice to programmers
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
    typer.main.get_command(app)(prog_name="finegraft")


if __name__ == "__main__":
    main()
