"""The command lines that the page starts, one function for each kind of job.

What: ``Command`` is a list of words, what a person would type; ``of`` makes one from what the page
sends. How: names become paths of the workspace first, so that no word can be a flag by accident.
Constraint: nothing passes a shell. Trade-off: flags that the page has no field for are typed in a
terminal.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finegraft.core.errors import ConfigError, did_you_mean
from finegraft.core.paths import write_whole
from finegraft.ui import forms
from finegraft.ui.workspace import CONFIGS, EXPORTS, REPORTS, Workspace

_FORMATS = re.compile(r"[a-z0-9][a-z0-9_\-]*(:[a-z0-9_\-]+)?")
_PARTS_OF_NAME = re.compile(r"[^\w.\-]+")


@dataclass(frozen=True)
class Command:
    """What is started.

    Attributes:
        words: Behind ``finegraft``, without ``--json``.
        run: The run that it is about, by its path in the workspace.
        report: A page that it writes, in the same words.
        makes_run: It trains, so it is at work in ``run``.
    """

    words: tuple[str, ...]
    run: str | None = None
    report: str | None = None
    makes_run: bool = False

    @property
    def shown(self) -> str:
        """As it is typed."""
        return shlex.join(["finegraft", *self.words])


def of(kind: str, asked: dict[str, Any], space: Workspace) -> Command:
    """The command of a job.

    Raises:
        ConfigError: FG-UI-012 an unknown kind, FG-UI-009 a field that is missing or wrong; and
            those of the workspace.
    """
    make = KINDS.get(kind)
    if make is None:
        raise ConfigError(
            "FG-UI-012",
            f"unknown kind of job '{kind[:40]}'",
            allowed=", ".join(KINDS),
            fix=did_you_mean(kind[:40], KINDS),
        )
    return make(asked, space)


def text_of(asked: dict[str, Any], key: str, default: str | None = None) -> str:
    """A field that is text and not empty.

    Raises:
        ConfigError: FG-UI-009.
    """
    value = asked.get(key, default)
    if not isinstance(value, str) or not value.strip() or len(value) > 4096:
        raise wrong(key, value, "text")
    return value


def wrong(key: str, value: Any, wanted: str) -> ConfigError:
    """The error for a field that is not what it must be."""
    return ConfigError(
        "FG-UI-009",
        f"the field '{key}' is {'missing' if value is None else repr(value)[:80]}",
        allowed=wanted,
        fix=f"send '{key}' as {wanted}",
    )


def _check(asked: dict[str, Any], space: Workspace) -> Command:
    data = _data(asked, space)
    report = f"{REPORTS}/{_stem(data)}.check.html"
    words = ["data", "check", data, *_about_rows(asked, space), "--report", report]
    return Command(tuple(words), report=report)


def _fix(asked: dict[str, Any], space: Workspace) -> Command:
    data = _data(asked, space)
    folder = PurePosixPath(data).parent
    name = space.free_name(str(folder), f"{_stem(data)}.fixed", ".jsonl")
    words = ["data", "check", data, *_about_rows(asked, space), "--fix", str(folder / name)]
    return Command(tuple(words))


def _data(asked: dict[str, Any], space: Workspace) -> str:
    return space.name_of(space.inside(text_of(asked, "data")))


def _stem(data: str) -> str:
    """``rows`` of ``data/rows.jsonl.gz``."""
    return _PARTS_OF_NAME.sub("-", PurePosixPath(data).name.split(".")[0]) or "rows"


def _about_rows(asked: dict[str, Any], space: Workspace) -> list[str]:
    words = []
    if asked.get("model"):
        words += ["--model", space.model(text_of(asked, "model"))]
    mapping = asked.get("map") or {}
    if not isinstance(mapping, dict):
        raise wrong("map", mapping, "an object of columns, wanted to found")
    for wanted, found in mapping.items():
        words += ["--map", f"{wanted}={found}"]
    if asked.get("max_length"):
        words += ["--max-length", str(forms.whole(asked, "max_length"))]
    if asked.get("task"):
        words += ["--task", text_of(asked, "task")]
    return words


def _train(asked: dict[str, Any], space: Workspace) -> Command:
    settings = asked.get("settings")
    if not isinstance(settings, dict):
        raise wrong("settings", settings, "an object of settings")
    form = forms.read(settings, space)
    name = form.name or space.free_name("runs", "run")
    run = space.run_folder(name)
    if (run / "config.yaml").exists() and not form.config.overwrite:
        raise ConfigError(
            "FG-UI-014",
            f"there is a run '{name}' already, and 'output' names it",
            allowed="a name that no run has",
            fix=f"output: {space.free_name('runs', name)}, or overwrite, which replaces it",
        )
    file = space.root / CONFIGS / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, form.yaml)
    path = space.name_of(run)
    return Command(("train", space.name_of(file), "--output", path), run=path, makes_run=True)


def _of_run(word: str, makes_run: bool = False) -> Callable[[dict[str, Any], Workspace], Command]:
    def make(asked: dict[str, Any], space: Workspace) -> Command:
        run = space.name_of(space.run(text_of(asked, "run")))
        return Command((word, run), run=run, makes_run=makes_run)

    return make


def _eval(asked: dict[str, Any], space: Workspace) -> Command:
    run = space.name_of(space.run(text_of(asked, "run")))
    words = ["eval", run]
    if asked.get("data"):
        words += ["--data", _data(asked, space)]
    if asked.get("vs"):
        other = text_of(asked, "vs")
        words += ["--vs", other if other == "base" else space.name_of(space.run(other))]
    return Command(tuple(words), run=run)


def _export(asked: dict[str, Any], space: Workspace) -> Command:
    name = text_of(asked, "run")
    run = space.name_of(space.run(name))
    given = asked.get("formats")
    formats = given if isinstance(given, list) else [given]
    if not formats or not all(isinstance(f, str) and _FORMATS.fullmatch(f) for f in formats):
        raise wrong("formats", given, "a list of formats, gguf:q8_0 say")
    wanted = text_of(asked, "output", f"{EXPORTS}/{name}")
    output = space.name_of(space.inside(wanted))
    words = ["export", run, "--to", ",".join(formats), "--output", output]
    return Command(tuple(words), run=run)


def _fetch(asked: dict[str, Any], space: Workspace) -> Command:
    return Command(("models", "fetch", space.model(text_of(asked, "model"))))


KINDS: dict[str, Callable[[dict[str, Any], Workspace], Command]] = {
    "check": _check,
    "fix": _fix,
    "train": _train,
    "resume": _of_run("resume", makes_run=True),
    "report": _of_run("report"),
    "export": _export,
    "eval": _eval,
    "fetch": _fetch,
}


def report_of(path: str, space: Workspace) -> Path:
    """The file of a command's report, which must be in the folder of reports.

    Raises:
        ConfigError: FG-UI-005.
    """
    return space.inside(f"{REPORTS}/{PurePosixPath(path).name}")
