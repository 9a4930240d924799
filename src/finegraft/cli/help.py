"""Help of one command, in two columns that fit 80 characters.

What: a command class whose ``--help`` shows every flag in full. How: rich, from the parameters that
typer made, one heading per panel. Constraint: no flag is ever cut short; typer's own table has six
columns and prints ``--per-device-train-...`` at this width. Trade-off: a second look beside the
group's own help, which typer draws.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

_LEFT_COLUMNS = 35  # "--per-device-train-batch-size INT" and two of space


def _left(param: Any) -> str:
    """``--rank INT``, ``--[no-]packing``, ``-h, --help``, or an argument's name."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name)
    if param.secondary_opts:
        return param.opts[0].replace("--", "--[no-]", 1)
    names = ", ".join(sorted(param.opts, key=len))
    return f"{names} {param.metavar}" if param.metavar else names


def _right(param: Any) -> Text:
    text = Text.from_markup(param.help or "")
    if param.show_default and param.default not in (None, False):
        text.append(f" [default: {param.default}]", style="dim")
    return text


class Help(TyperCommand):
    """A command with readable help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, the docstring, then the parameters under their panels' names."""
        to = Console(highlight=False)
        pieces = " ".join(self.collect_usage_pieces(ctx))
        to.print(Text(f"Usage: {ctx.command_path} {pieces}", style="bold"))
        to.print(Padding(Text((self.help or "").strip()), (1, 0, 0, 2), expand=False))
        panels: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if not getattr(param, "hidden", False):
                title = "Arguments" if param.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(param, "rich_help_panel", None) or title, []).append(
                    param
                )
        for title, params in panels.items():
            table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
            table.add_column(width=_LEFT_COLUMNS, no_wrap=True)
            table.add_column(overflow="fold")
            for param in params:
                table.add_row(Text(_left(param), style="cyan"), _right(param))
            to.print(Text(f"\n{title}", style="bold"))
            to.print(Padding(table, (0, 0, 0, 2), expand=False))
