"""Command-line flags made from the schema, so that no flag is ever written down twice.

What: one option per field of ``TrainConfig``, and the way back from what was typed to values. How:
the field's type chooses the kind of option, its description is the help, its default is shown, its
group is the panel. Constraint: a flag that was not typed is None here and overrides nothing.
Trade-off: limits such as "at least 1" are checked by the schema after parsing, together with those
of the YAML file, and so are reported all at once instead of one by one.
"""

from __future__ import annotations

import inspect
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig, groups, parse_assignment

# names; anything else is all-linear or a regular expression
_NAMES = re.compile(r"[\w.\s,]+")
SOURCES = ("data", "eval_data")
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


def _without_none(annotation: Any) -> Any:
    """``str | None`` as ``str``; other unions are left alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def _help(info: FieldInfo, kind: Any) -> str:
    text = escape(info.description or "")
    if get_origin(kind) is Literal:
        text += escape(f" ({', '.join(map(str, get_args(kind)))})")
    if info.default in (None, {}) or info.is_required():
        return text
    default = info.default
    shown = ("on" if default else "off") if isinstance(default, bool) else str(default)
    return f"{text} [dim]{escape(f'[default: {shown}]')}[/dim]"


def _parameter(name: str, info: FieldInfo, panel: str) -> inspect.Parameter:
    kind = _without_none(info.annotation)
    dashed = name.replace("_", "-")
    flag, accepted, metavar = f"--{dashed}", str, _METAVARS.get(kind)
    if kind is bool:
        flag, accepted = f"--{dashed}/--no-{dashed}", bool
    elif kind in _METAVARS:
        accepted = kind
    elif get_origin(kind) is Literal:
        accepted, metavar = kind, "CHOICE"
    elif get_origin(kind) is dict:
        accepted, metavar = list[str], "WANTED=FOUND" if name == "map" else "NAME=VALUE"
    elif name in SOURCES:  # one is text, several are a list
        accepted, metavar = list[str], "ROWS"
    elif get_origin(kind) is list:  # what may hold commas is given once for each
        accepted, metavar = list[str], "TEXT"
    else:  # a list or one name
        metavar = "NAME,NAME"
    option = typer.Option(
        flag, help=_help(info, kind), rich_help_panel=panel, metavar=metavar, show_default=False
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[accepted | None, option],
    )


def parameters() -> list[inspect.Parameter]:
    """One keyword parameter per field of the schema, in the order of its groups."""
    fields = TrainConfig.model_fields
    return [
        _parameter(name, fields[name], group.capitalize())
        for group, names in groups().items()
        for name in names
    ]


def with_schema_flags(command: Any) -> Any:
    """Give a function that ends in ``**flags`` one parameter per field of the schema.

    typer reads a function's signature; the signature is all that is changed.
    """
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    every = [*own, *parameters()]
    command.__signature__ = inspect.Signature(every)
    command.__annotations__ = {p.name: p.annotation for p in every}
    return command


def _mapping(pairs: list[str]) -> dict[str, str]:
    """Read ``wanted=found`` pairs.

    Raises:
        ConfigError: FG-CLI-003, a pair without an equals sign or with an empty side.
    """
    out = {}
    for pair in pairs:
        wanted, _, found = pair.partition("=")
        if not wanted or not found:
            raise ConfigError(
                "FG-CLI-003",
                f"--map got {pair!r}",
                allowed="wanted=found, once for each column",
                fix="for example --map prompt=question --map completion=answer",
            )
        out[wanted] = found
    return out


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Values of the flags that were typed, in the schema's types.

    Raises:
        ConfigError: FG-CLI-003, see ``--map``.
    """
    values = {name: value for name, value in flags.items() if value not in (None, [])}
    if "map" in values:
        values["map"] = _mapping(values["map"])
    if "method_settings" in values:
        values["method_settings"] = dict(map(parse_assignment, values["method_settings"]))
    for key in SOURCES:
        if key in values and len(values[key]) == 1:
            values[key] = values[key][0]
    for key in ("target_modules", "modules_to_save"):
        modules = values.get(key)
        if modules is not None and _NAMES.fullmatch(modules):
            values[key] = [name.strip() for name in modules.split(",") if name.strip()]
    return values


def overrides(assignments: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """What replaces keys of the YAML file: ``--set`` first, flags above it.

    Raises:
        ConfigError: FG-CONF-004 or FG-CLI-003, something that is not ``key=value``.
    """
    return {**dict(parse_assignment(text) for text in assignments), **given(flags)}
