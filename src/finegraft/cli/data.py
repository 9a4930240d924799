"""``finegraft data``: commands about rows. Here: ``data show``.

What: a few rows as training sees them, every token marked as trained, read or cut off. How: all of
it from ``data.show``; colours in a terminal, brackets elsewhere and with NO_COLOR. Constraint: the
rest of a file is not read, so this answers at once whatever its size. Trade-off: without --model
the rows are rendered for the demo model, which says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from finegraft.cli.flags import _mapping
from finegraft.cli.help import Help
from finegraft.cli.output import only_warnings, quiet_libraries
from finegraft.core.schema import default_of, read_file

group = typer.Typer(
    name="data",
    help="Look at rows before training on them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_COLOURS = {"trained": "bold green", "read": "", "cut": "dim strike red"}
_SHADES = {  # of neighbouring tokens, so that their borders are seen
    "trained": ("black on green", "black on bright_green"),
    "read": ("on grey23", "on grey35"),
    "cut": ("strike red", "strike bright_red"),
}
_MARKS = {"trained": ("[", "]"), "read": ("", ""), "cut": ("~~", "~~")}


def settings_of(data: list[str], **typed: Any) -> dict[str, Any]:
    """What to render with: the keys of a YAML file of settings, what was typed above them.

    Args:
        data: Rows, or one YAML file that names them.
        typed: Settings from flags; None where there was none.
    """
    found: dict[str, Any] = {"data": data[0] if len(data) == 1 else data}
    if len(data) == 1 and Path(data[0]).suffix.lower() in (".yaml", ".yml"):
        found = read_file(data[0])
    found |= {key: value for key, value in typed.items() if value is not None}
    return {**{key: default_of(key, "causal") for key in _USED}, **found}


_COLUMNS = {"text": "text", "pair": "text_pair", "label": "label"}
_USED = ("map", "max_length", "chat_template", "completion_only_loss", "revision")


def show(
    ctx: typer.Context,
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Rows, or a YAML file of settings.")
    ],
    count: Annotated[int, typer.Option("-n", "--count", metavar="INT", help="Rows shown.")] = 3,
    row: Annotated[
        int | None, typer.Option("--row", metavar="INT", help="Show this row, counted from 1.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show every token by itself.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="TEXT", help="Whose tokens; unset: demo.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", metavar="INT", help="Longest row, in tokens.")
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="WANTED=FOUND", help="Columns to rename."),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="TEXT", help="Another template.")
    ] = None,
    completion_only_loss: Annotated[
        bool | None,
        typer.Option(
            "--completion-only-loss/--no-completion-only-loss", help="Learn the answers only."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TEXT", help="The task of the rows; unset: by columns."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show rows as training sees them, and which tokens are trained.

    For example:

      finegraft data show rows.jsonl --tokens --row 17
    """
    settings = settings_of(
        data,
        model=model,
        max_length=max_length,
        map=_mapping(mapping) if mapping else None,
        chat_template=chat_template,
        completion_only_loss=completion_only_loss,
        task=task,
    )
    first, wanted = (row, 1) if row is not None else (1, max(1, count))
    with ctx.obj.busy("reading"), quiet_libraries(), only_warnings():
        from finegraft.data import show_labels

        task = show_labels.task_of(settings["data"], settings["map"], settings.get("task"))
        labelled = task != "causal"
        render = _labelled if labelled else _conversations
        told = settings.get("model") or ("demo-encoder" if labelled else "demo")
        found, longest = render(settings | {"model": told, "task": task}, max(1, first), wanted)
    result = {
        "model": told,
        "max_length": longest,
        "rows": [_object(p, r, tokens) for p, r in found],
    }

    def write(to: Console) -> None:
        for one, its in found:
            _write(to, one, its, tokens, longest)
        marked = "green" if _coloured(to) else "in brackets"
        ending = "The label is trained" if labelled else f"Trained tokens are {marked}"
        other = "" if settings.get("model") else "; --model shows another model's tokens"
        to.print(Text(f"{ending}. Rendered for {told}{other}.", style="dim"), soft_wrap=True)

    ctx.obj.result(result, write)


def _conversations(settings: dict[str, Any], first: int, count: int) -> tuple[list[Any], int]:
    """Rows with what training makes of their tokens, and the longest row in tokens."""
    from finegraft.data import show as rendering

    picked = rendering.rows(settings["data"], settings["map"], first=first, count=count)
    tokenizer = _tokenizer(settings)
    lengths = {
        "max_length": settings["max_length"],
        "completion_only": settings["completion_only_loss"],
    }
    return [(one, rendering.shown(one, tokenizer, **lengths)) for one in picked], lengths[
        "max_length"
    ]


def _labelled(settings: dict[str, Any], first: int, count: int) -> tuple[list[Any], int]:
    """Labelled texts with their tokens, and the longest text in tokens."""
    from finegraft import opening
    from finegraft.data import show_labels
    from finegraft.models.locate import locate

    columns = {name: settings.get(f"{key}_column") for name, key in _COLUMNS.items()}
    picked = show_labels.rows(
        settings["data"],
        settings["map"],
        task=settings["task"],
        columns=columns,
        first=first,
        count=count,
    )
    tokenizer = opening.open_text_tokenizer(
        locate(settings["model"], revision=settings["revision"]),
        max_seq_length=settings["max_length"],
        truncation_side=settings.get("truncation_side"),
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    shown = [(one, show_labels.shown(one, tokenizer)) for one in picked]
    return shown, tokenizer.model_max_length


def _tokenizer(settings: dict[str, Any]) -> Any:
    from finegraft import opening
    from finegraft.data.chat_templates import get_chat_template
    from finegraft.models.locate import locate

    located = locate(settings["model"], revision=settings["revision"])
    tokenizer = opening.open_tokenizer(
        located, trust_remote_code=settings.get("trust_remote_code", False)
    )
    template = settings["chat_template"]
    return get_chat_template(tokenizer, template) if template else tokenizer


def _object(row: Any, its: Any, tokens: bool) -> dict[str, Any]:
    return {
        "row": row.place,
        "source": row.source,
        "source_row": row.number,
        "format": row.format,
        "text": "".join(text for _, text in its.parts),
        "tokens": len(its.ids),
        "trained_tokens": its.trained,
        "cut_tokens": its.cut,
        "dropped": its.dropped,
        **({"label": row.label} if hasattr(row, "label") else {}),
        **({"pieces": its.pieces, "states": its.states, "ids": its.ids} if tokens else {}),
    }


def _coloured(to: Console) -> bool:
    return to.is_terminal and not to.no_color


def _write(to: Console, row: Any, its: Any, tokens: bool, max_length: int) -> None:
    title = f"row {row.place} ({row.source}, {row.format}): {len(its.ids):,} tokens"
    if hasattr(row, "label"):
        title += f", label {row.label}"
    else:
        title += f", {its.trained:,} trained"
    to.print(Text(title, style="bold"), soft_wrap=True)
    body = Text()
    (_tokens if tokens else _text)(body, its, _coloured(to))
    body.rstrip()
    to.print(body, soft_wrap=True)
    if its.cut:
        words = f"{its.cut:,} tokens beyond --max-length {max_length:,} are cut off"
        to.print(Text(words, style="yellow"), soft_wrap=True)
    if its.dropped:
        words = "training leaves this row out: nothing in it is an answer to learn"
        to.print(Text(words, style="yellow"), soft_wrap=True)
    to.print()


def _text(body: Text, its: Any, coloured: bool) -> None:
    """The rendered text, what is trained of it in colour or in brackets."""
    for state, said in its.parts:
        before, after = _MARKS[state]
        body.append(said if coloured else f"{before}{said}{after}", style=_COLOURS[state])


def _tokens(body: Text, its: Any, coloured: bool) -> None:
    r"""Every token apart: spaces as a middle dot, line ends as \n and a new line after them."""
    for place, (piece, state) in enumerate(zip(its.pieces, its.states, strict=True)):
        seen = piece.replace(" ", "\u00b7").replace("\t", "\\t").replace("\n", "\\n")
        before, after = _MARKS[state]
        end = "\n" if piece.endswith("\n") else "" if coloured else " "
        body.append(seen if coloured else f"{before}{seen}{after}", style=_SHADES[state][place % 2])
        body.append(end)


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    app.add_typer(group)


group.command("show", cls=Help)(show)
