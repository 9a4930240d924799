"""``finegraft explain``: the page of a code, or the list of all of them.

What: cause, cure and an example of an error or of a finding. How: everything comes from
``core.explanations``. Constraint: nothing heavy is imported. Trade-off: case, the ``FG-`` and
leading zeros may be left out, so ``data-7`` is ``FG-DATA-007``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finegraft.cli.help import Help
from finegraft.cli.output import Output
from finegraft.core.errors import ConfigError, near
from finegraft.core.explanations import Explanation, codes, explain, texts

_WIDEST = 100
_CODE = re.compile(r"(?:FG-)?([A-Z]+)-?(\d{1,3})")


def _explained(word: str) -> list[Explanation]:
    """The explanation of a code, or those of a part.

    Raises:
        ConfigError: FG-CORE-001, no such code.
    """
    every = {code: explain(code) for code in codes()}
    if not word:
        return [every[code] for code in sorted(every)]
    upper = word.strip().upper()
    split = _CODE.fullmatch(upper)
    code = f"FG-{split[1]}-{int(split[2]):03d}" if split else upper
    if code in every:
        return [every[code]]
    part = upper.removeprefix("FG-").rstrip("-")
    members = [every[code] for code in sorted(every) if code.split("-")[1] == part]
    if members and not split:
        return members
    parts = sorted({code.split("-")[1].lower() for code in every})
    close = near(code, every)
    raise ConfigError(
        "FG-CORE-001",
        f"unknown code '{word}'",
        allowed="a code such as FG-DATA-007, or a part: " + ", ".join(parts),
        fix=f"did you mean '{close}'?" if close else "finegraft explain lists all of them",
    )


def _page(one: Explanation, to: Console) -> None:
    to.print(Text(one.code, "bold").append(f"  {one.part}", "dim"))
    to.print(Text(one.title))
    for title, text in (("Cause", one.cause), ("Cure", one.cure), ("Example", one.example)):
        to.print(Text(f"\n{title}", "bold"))
        to.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
    for place in one.places if one.code in texts() else ():
        to.print(Text("\nMessage", "bold"))
        to.print(Padding(Text(place.message(one.code)), (0, 0, 0, 2), expand=False))
    files = dict.fromkeys(place.file for place in one.places)
    if files:
        kinds = dict.fromkeys(f"{place.kind} ({place.builtin})" for place in one.places)
        to.print(f"\nRaised as {', '.join(kinds)} in {', '.join(files)}", style="dim")


def _list(many: list[Explanation], to: Console) -> None:
    part = ""
    table = Table(box=None, show_header=False, pad_edge=False)
    for one in many:
        if one.part != part:
            part = one.part
            table.add_row(Text(part, "bold"))
        line = " ".join(one.title.split())
        short = line if len(line) <= _WIDEST else line[:_WIDEST] + "..."
        table.add_row(Text(f"  {one.code}", "cyan"), Text(short))
    to.print(table)
    to.print("\nfinegraft explain CODE shows cause, cure and an example.", style="dim")


def explain_(
    ctx: typer.Context,
    code: Annotated[
        str, typer.Argument(metavar="[CODE]", help="FG-DATA-007, or a part: data. Unset: all.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain an error code: cause, cure and an example."""
    out: Output = ctx.obj
    found = _explained(code)
    values: dict[str, Any] = {"codes": [one.as_dict() for one in found]}
    single = len(found) == 1 and code
    out.result(values, lambda to: _page(found[0], to) if single else _list(found, to))


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("explain", cls=Help)(explain_)
