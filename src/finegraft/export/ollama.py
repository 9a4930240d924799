"""A folder for ``ollama create``: GGUF weights and a Modelfile.

What: one GGUF file of the merged weights, and a Modelfile with FROM, TEMPLATE, SYSTEM, stops and
parameters. How: the TEMPLATE is read off the tokenizer's own chat template (``_template``); the
Modelfile is written last. Constraint: what the TEMPLATE cannot express stands in the Modelfile as a
comment and is logged. Trade-off: one type a folder, because a Modelfile has one FROM.

Source: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError, ExportError
from finegraft.core.paths import write_whole
from finegraft.export import _template
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import Origin, open_origin

log = logging.getLogger(__name__)

MODELFILE = "Modelfile"
# Ollama's own default of num_ctx cuts long conversations; a longer one takes memory at once.
_CONTEXT_TOKENS = 8192


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    from finegraft.export import _save, gguf

    try:
        origin = open_origin(source)
        _one(types)
        modelfile(origin, "model.gguf", **options)
        return gguf.problems(_save.gguf_source(origin), path, list(types))
    except (ExportError, ConfigError) as error:
        return [error]


def _one(types: Sequence[str]) -> str:
    if len(types) == 1:
        return types[0]
    raise ExportError(
        "FG-EXPORT-072",
        f"{len(types)} types for one Modelfile: {', '.join(types) or 'none'}",
        allowed="one type a folder",
        fix="export once for each type, with another --output",
    )


def write(
    source: Any,
    path: str | Path,
    types: Sequence[str],
    *,
    system: str | None = None,
    temperature: float | None = None,
    num_ctx: int | None = None,
) -> list[Written]:
    """Write the weights and the Modelfile.

    Args:
        source: A run, adapter or model folder, or (model, tokenizer).
        path: The folder.
        types: One type of GGUF.
        system: System text of conversations that bring none; None: as the chat template has it.
        temperature: None: as the model's generation settings have it.
        num_ctx: Longest conversation in tokens; None: what the model knows, at most 8,192.

    Raises:
        ExportError: FG-EXPORT-070 no chat template, FG-EXPORT-071 one that Ollama cannot express,
            FG-EXPORT-072 several types, FG-EXPORT-073 a system text that no Modelfile can hold; and
            those of ``export.gguf``.
    """
    from finegraft.export import _save, gguf

    origin = open_origin(source)
    _one(types)
    options = {"system": system, "temperature": temperature, "num_ctx": num_ctx}
    written = gguf.write(_save.gguf_source(origin), path, list(types))
    text = modelfile(origin, written[0].file.name, **options)
    write_whole(Path(path) / MODELFILE, text)
    return written


def modelfile(
    origin: Origin,
    weights: str,
    *,
    system: str | None = None,
    temperature: float | None = None,
    num_ctx: int | None = None,
) -> str:
    """The text of a Modelfile for the GGUF file called ``weights`` beside it.

    Raises:
        ExportError: FG-EXPORT-070, FG-EXPORT-071 and FG-EXPORT-073, as for ``write``.
    """
    turns = _template.derive(origin.tokenizer)
    if system is not None and '"""' in system:
        raise ExportError(
            "FG-EXPORT-073",
            'the system text holds """, which ends a text in a Modelfile',
            allowed="a system text without three double quotes in a row",
            fix="write it with other quotes",
        )
    for difference in turns.differences:
        log.warning("Ollama will render otherwise than training did: %s", difference)
    settings, config = _settings(origin)
    known = getattr(config, "max_position_embeddings", None) or _CONTEXT_TOKENS
    temperature = temperature if temperature is not None else settings.get("temperature")
    parameters = [("num_ctx", num_ctx or min(known, _CONTEXT_TOKENS))]
    if temperature is not None:
        parameters.append(("temperature", temperature))
    parameters += [("stop", f'"{stop}"') for stop in _stops(origin.tokenizer, settings, turns)]
    lines = [f"# differs from training: {difference}" for difference in turns.differences]
    lines += [f"FROM ./{weights}", f'TEMPLATE """{turns.go()}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    return "\n".join(lines) + "\n"


def _settings(origin: Origin) -> tuple[dict[str, Any], Any]:
    """Generation settings of the model as a dictionary, and its configuration."""
    from finegraft.export._weights import open_plain

    plain = open_plain(origin, None)
    generation = plain.generation.to_dict() if plain.generation is not None else {}
    return generation, plain.config.get_text_config()


def _stops(tokenizer: Any, settings: dict[str, Any], turns: _template.Turns) -> list[str]:
    """Texts that end an answer: the end tokens, and what the template puts behind an answer."""
    ends = settings.get("eos_token_id", tokenizer.eos_token_id)
    ids = ends if isinstance(ends, list) else [ends]
    texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids if i is not None]
    after = turns.assistant.after.strip()
    if after and not any(after.startswith(text) for text in texts):
        texts.append(after)
    return list(dict.fromkeys(text for text in texts if '"' not in text and "\n" not in text))


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Load the weights with llama.cpp and compare, see ``export._verify``."""
    from finegraft.export import _verify

    return _verify.verify(file, source, mark=False).checks


def _variants() -> dict[str, str]:
    from finegraft.export.gguf.types import FILE_TYPES

    return {name: kind.summary for name, kind in FILE_TYPES.items()}


FORMAT = Format(
    summary="GGUF and a Modelfile for `ollama create`",
    variants=_variants(),
    options={
        "system": "text of conversations that bring none",
        "temperature": "of answers",
        "num_ctx": "longest conversation, in tokens",
    },
    problems=problems,
    write=write,
    verify=verify,
)
