"""The form of a training: settings as the page sends them, checked, and as a command line.

What: ``read`` gives a configuration and the settings that are not defaults; ``schema`` describes
the form. How: all of it from ``core.schema``. Constraint: rows and model lie in the workspace or
have a name of a hub. Trade-off: lists and mappings appear in a command line as ``--set``, which is
less pretty than flags and is the same.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig, build, default_of, groups
from finegraft.ui.workspace import RUNS, Workspace

# What a first run needs; everything else is folded.
BASIC = (
    "model",
    "data",
    "task",
    "method",
    "output",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "max_length",
    "r",
    "lora_alpha",
    "eval_fraction",
    "load_in_4bit",
)


@dataclass(frozen=True)
class Form:
    """What was filled in.

    Attributes:
        config: The whole configuration.
        own: Settings that are not defaults, ``output`` left out.
        name: Of the run, or nothing.
    """

    config: TrainConfig
    own: dict[str, Any]
    name: str

    @property
    def yaml(self) -> str:
        """The file that ``finegraft train`` takes."""
        return str(yaml.safe_dump(self.own, sort_keys=False, allow_unicode=True))

    def command(self, word: str) -> str:
        """The same settings as flags of a command."""
        words = ["finegraft", word]
        for key, value in self.own.items():
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            elif isinstance(value, list | dict) or str(value).startswith("-"):
                words += ["--set", f"{key}={json.dumps(value)}"]
            else:
                words += [flag, str(value)]
        if self.name and word == "train":
            words += ["--output", f"{RUNS}/{self.name}"]
        return shlex.join(words)


def read(settings: dict[str, Any], space: Workspace) -> Form:
    """Check what was filled in; empty fields count as not filled in.

    Raises:
        ConfigError: FG-CONF-001 to FG-CONF-003 and FG-ADAPT-040, FG-ADAPT-041, of the schema;
            FG-UI-005 rows or a model elsewhere.
    """
    given = {k: v for k, v in settings.items() if v is not None and v != ""}
    name = str(given.pop("output", "")).removeprefix(f"{RUNS}/").rstrip("/")
    output = space.name_of(space.run_folder(name)) if name else f"{RUNS}/run"
    config = build({**given, "output": output}, "the form")
    for rows in (config.data, config.eval_data):
        if rows:
            space.rows(rows)
    if config.chat_template and config.chat_template.endswith((".jinja", ".j2")):
        space.inside(config.chat_template)
    model = space.model(config.model)
    config = config.model_copy(update={"model": model})
    own = {
        key: config.model_dump(mode="json")[key]
        for key, info in TrainConfig.model_fields.items()
        if key in given and (info.is_required() or _differs(key, config))
    }
    return Form(config, own, name)


def _differs(key: str, config: TrainConfig) -> bool:
    return bool(getattr(config, key) != default_of(key, config.task))


def schema() -> dict[str, Any]:
    """The form: JSON schema, groups of keys, and the keys shown first."""
    return {
        "schema": TrainConfig.model_json_schema(),
        "groups": [{"name": name, "keys": keys} for name, keys in groups().items()],
        "basic": list(BASIC),
    }


def whole(asked: dict[str, Any], key: str, default: int | None = None) -> int:
    """A field that is a whole number of at least 0, also as text.

    Raises:
        ConfigError: FG-UI-009.
    """
    value = asked.get(key, default)
    number = -1
    if isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = int(value)
    if number < 0 or number >= 2**53:
        raise ConfigError(
            "FG-UI-009",
            f"the field '{key}' is {repr(value)[:80]}",
            allowed="a whole number of at least 0",
            fix=f"send '{key}' as a whole number",
        )
    return number
