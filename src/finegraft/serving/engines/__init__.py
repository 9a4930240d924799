"""Engines that answer, one module each, found by name.

What: ``ENGINES`` lists the files of this folder that do not begin with an underscore; ``choose``
finds the one for a model. Constraint: listing imports nothing, so that the llama.cpp package is
needed by those who serve GGUF files only.
"""

from __future__ import annotations

from pathlib import Path

from finegraft.core.errors import ConfigError
from finegraft.core.registry import Registry
from finegraft.serving.engines._contract import (
    Ask,
    Embedded,
    Engine,
    EngineKind,
    Options,
    Piece,
    Served,
    Settings,
    Token,
)

__all__ = [
    "ENGINES",
    "Ask",
    "Embedded",
    "Engine",
    "EngineKind",
    "Options",
    "Piece",
    "Served",
    "Settings",
    "Token",
    "choose",
    "is_gguf",
]

ENGINES: Registry[EngineKind] = Registry("finegraft.serving.engines", "ENGINE", "engine")


def is_gguf(name: str) -> bool:
    """Whether ``name`` is a GGUF file on this machine."""
    path = Path(name).expanduser()
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return handle.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"


def choose(settings: Settings) -> Engine:
    """Make the engine that serves a model; nothing is loaded yet.

    Args:
        settings: Its ``engine`` is a name of ``ENGINES``, or ``auto``: llama.cpp for a GGUF file,
            an encoder's for an encoder, else the one in this process.

    Raises:
        ConfigError: FG-CORE-001 no such engine, FG-SERVE-003 one that cannot serve this model.
    """
    name = settings.engine
    if name == "auto":
        name = "llamacpp" if is_gguf(settings.model) else _for_folder(settings)
    kind = ENGINES.get(name)
    reason = kind.unfit(settings)
    if reason is not None:
        raise ConfigError(
            "FG-SERVE-003",
            f"engine '{name}' cannot serve {settings.model}: {reason}",
            allowed="; ".join(f"{n}: {k.summary}" for n, k in ENGINES.items()),
            fix="leave --engine out",
        )
    return kind.make(settings)


def _for_folder(settings: Settings) -> str:
    encoder = ENGINES.get("encoder")
    return "encoder" if encoder.unfit(settings) is None else "inprocess"
