"""``finegraft models``: what is stored on this machine, fetching and removing.

What: three commands over ``models.stored`` and ``models.locate``. Constraint: nothing is removed
but what is named. Trade-off: fetching needs no flags, because a model is fetched by itself when it
is first used; this is for doing so before.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finegraft.cli.help import Help
from finegraft.cli.output import quiet_libraries
from finegraft.cli.progress import size

group = typer.Typer(
    name="models",
    help="Models stored on this machine: list, fetch, remove.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def list_(ctx: typer.Context, as_json: Json = False) -> None:
    """List models in finegraft's cache and in the hub's, with their sizes."""
    from finegraft.models import stored

    found = stored.models()
    values = {
        "models": [asdict(one) for one in found],
        "size_bytes": sum(one.size_bytes for one in found),
    }
    ctx.obj.result(values, lambda to: _table(found, to))


def _table(found: list[Any], to: Console) -> None:
    if not found:
        to.print("No models yet. Fetch one with:\n  finegraft models fetch demo", markup=False)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("model", "kind", "size"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for one in found:
        table.add_row(Text(one.name), one.kind, size(one.size_bytes))
    to.print(table)


def fetch(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="demo, demo-encoder or a hub name.")
    ],
    as_json: Json = False,
) -> None:
    """Bring a model to this machine before it is used.

    For example:

      finegraft models fetch demo
    """
    out, began = ctx.obj, time.monotonic()
    with out.busy(f"fetching {model}"), quiet_libraries():
        from finegraft.models.locate import locate

        path = locate(model).path
    values = {"model": model, "path": str(path), "seconds": round(time.monotonic() - began, 1)}
    out.result(values, lambda to: _line(to, f"{model} is in {path}"))


def remove(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name that the list shows.")],
    as_json: Json = False,
) -> None:
    """Remove a stored model; it is fetched again when it is used.

    For example:

      finegraft models remove demo-encoder
    """
    from finegraft.models import stored

    gone = stored.remove(model)
    values = {"model": model, "path": str(gone.path), "freed_bytes": gone.size_bytes}
    ctx.obj.result(values, lambda to: _line(to, f"removed {model}, {size(gone.size_bytes)}"))


def _line(to: Console, words: str) -> None:
    to.print(words, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    app.add_typer(group)


group.command("list", cls=Help)(list_)
group.command("fetch", cls=Help)(fetch)
group.command("remove", cls=Help)(remove)
