"""``finegraft ui``: the same in a browser.

What: a server on this machine over a folder of runs, and the address that opens it. How: the page
starts the commands of this program and shows them. Constraint: the address opens the page once;
nobody else on the machine can use it. Trade-off: commands that the page started go on when the
server ends, as they would in another terminal.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from finegraft.cli.help import Help
from finegraft.cli.output import Output

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def ui(
    ctx: typer.Context,
    workspace: Annotated[
        Path, typer.Option("--workspace", metavar="DIR", help="The folder with runs/ and data/.")
    ] = Path("."),
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, metavar="INT", help="Unset: 8760, or a free one."),
    ] = None,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Print the address, start no browser.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Open a page to look at rows, train, compare, try and export.

    For example:

      finegraft ui --workspace my-project
    """
    out: Output = ctx.obj
    from finegraft.ui import server

    def ready(address: str) -> None:
        if out.as_json:
            values = {"address": address, "workspace": str(workspace.resolve())}
            out.result(values, lambda _: None)
            return
        out.note(f"working in {workspace.resolve()}")
        _say(out, address)
        if sys.stdin.isatty():
            out.note("it opens once; Enter prints another address, Ctrl-C ends the server")
        if not no_open and _has_screen():
            webbrowser.open(address)

    def stopping() -> None:
        out.note("ended; commands that the page started go on")

    server.serve(workspace, port, ready=ready, again=lambda a: _say(out, a), stopping=stopping)


def _say(out: Output, address: str) -> None:
    out.err.print(f"open  {address}", markup=False, soft_wrap=True)


def _has_screen() -> bool:
    """Whether a browser would open a window, and not take this terminal."""
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(ui)
