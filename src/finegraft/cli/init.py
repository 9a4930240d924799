"""``finegraft init``: a file of settings that fits the rows.

What: the rows are looked at, and a commented YAML file is written that ``finegraft train`` takes as
it is. How: ``data.propose`` decides, the schema checks the file before it is written. Constraint:
no file is ever replaced without --overwrite. Trade-off: only what differs from the defaults, or is
worth changing first, stands in the file.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from finegraft.cli.help import Help
from finegraft.cli.output import only_warnings, quiet_libraries
from finegraft.core.errors import ConfigError
from finegraft.core.paths import write_whole
from finegraft.core.schema import build, default_of

MODELS = {
    "causal": "demo",
    "classification": "demo-encoder",
    "token_classification": "demo-encoder",
}
_LONGEST_TOKENS = 1 << 20  # tokenizers that know no limit say 1e30
_OTHER = {"learning_rate": "the usual one for LoRA", "r": "LoRA rank: higher learns more"}


def init(
    ctx: typer.Context,
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Rows to train on.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="TEXT", help="Model to train; unset: the small demo."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TEXT", help="Unset: found in the rows.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="File of settings to write.")
    ] = Path("settings.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at rows and write settings that fit them.

    For example:

      finegraft init rows.jsonl --model demo
    """
    if output.exists() and not overwrite:
        raise ConfigError(
            "FG-DATA-038",
            f"{output} is there already",
            allowed="a new file",
            fix="--output with another name, or --overwrite",
        )
    if task is not None and task not in MODELS:
        raise ConfigError(
            "FG-DATA-040", f"--task is '{task}'", allowed=", ".join(MODELS), fix="--task causal"
        )
    spec: Any = data[0] if len(data) == 1 else data
    with ctx.obj.busy("reading the rows"), quiet_libraries(), only_warnings():
        from finegraft.data import propose

        found = propose.look(spec, task)
        model = model or MODELS[found.task]
        tokenizer = _tokenizer(model, found.task)
        counted = propose.lengths(found, tokenizer)
        longest = min(tokenizer.model_max_length, _LONGEST_TOKENS)
        chosen = propose.propose(found, counted, longest)
    text = _yaml(spec, model, found, chosen, output)
    settings = build(yaml.safe_load(text), str(output))
    write_whole(output, text)
    result = {
        "settings": str(output),
        "task": found.task,
        "format": found.layout,
        "rows": found.rows,
        "map": found.map,
        "model": model,
        "tokens": {"median": counted[len(counted) // 2], "longest": counted[-1]},
        "values": {one.key: one.value for one in chosen},
    }
    ctx.obj.result(result, lambda to: _show(to, result, settings))


def _tokenizer(model: str, task: str) -> Any:
    from finegraft import opening
    from finegraft.models.locate import locate

    located = locate(model)
    if task == "causal":
        return opening.open_tokenizer(located)
    return opening.open_text_tokenizer(located)


def _yaml(spec: Any, model: str, found: Any, chosen: list[Any], output: Path) -> str:
    """The file: what was found, then what was chosen, each with its reason."""
    first = spec if isinstance(spec, str) else spec[0]
    name = Path(first.partition("=")[0]).name.split(".")[0].strip("*?-") or "rows"
    file = shlex.quote(str(output))
    show = [f"# Look at the rows:  finegraft data show {file} --tokens"]
    lines = [
        f"# Settings for {found.rows:,} rows ({found.layout}).",
        *(show if found.task == "causal" else []),
        f"# Train:             finegraft train {file}",
        "# All keys:          finegraft train --help",
        "",
        _line("task", found.task, "what is learnt"),
        _line("model", model, "hub name, folder, GGUF file, or demo"),
        _line("data", spec, f"{found.rows:,} rows"),
    ]
    if found.map:
        lines.append(_line("map", found.map, "columns, wanted: found"))
    lines += ["", *(_line(one.key, one.value, one.reason) for one in chosen)]
    lines += [_line(key, default_of(key, found.task), why) for key, why in _OTHER.items()]
    lines += ["", _line("output", f"runs/{name}", "the run folder"), ""]
    return "\n".join(lines)


def _line(key: str, value: Any, why: str) -> str:
    flow = {"default_flow_style": True, "allow_unicode": True, "sort_keys": False}
    shown = yaml.safe_dump({key: value}, width=10**6, **flow)
    inner = shown.strip().removeprefix("{").removesuffix("}")
    return f"{inner:<40}  # {why}"


def _show(to: Console, result: dict[str, Any], settings: Any) -> None:
    def line(words: str, style: str = "") -> None:
        to.print(words, style=style, markup=False, soft_wrap=True)

    tokens = result["tokens"]
    line(f"{result['rows']:,} rows, {result['task']}, {result['format']}", "bold")
    for wanted, old in result["map"].items():
        line(f"  the column '{old}' is read as '{wanted}'")
    line(f"  median {tokens['median']:,} tokens, longest {tokens['longest']:,}")
    line(f"Wrote {result['settings']}", "green")
    file = shlex.quote(result["settings"])
    line("\nNext:")
    if result["task"] == "causal":
        line(f"  finegraft data show {file} --tokens", "bold")
    line(f"  finegraft train {file}", "bold")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Help)(init)
