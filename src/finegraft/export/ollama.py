"""A folder for ``ollama create``: GGUF weights and a Modelfile.

What: one GGUF file of the merged weights, or (``ollama:adapter``) a GGUF adapter beside the file of
its base or the name that Ollama has for it; and a Modelfile with FROM, ADAPTER, TEMPLATE, SYSTEM,
stops and parameters. How: the TEMPLATE is read off the tokenizer's own chat template
(``_template``); the Modelfile is written last. Constraint: what the TEMPLATE cannot express stands
in the Modelfile as a comment and is logged. Trade-off: one type a folder, because a Modelfile has
one FROM.

Source: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError, ExportError
from finegraft.core.paths import write_whole
from finegraft.export import _template
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import Origin, open_origin

log = logging.getLogger(__name__)

MODELFILE = "Modelfile"
ADAPTER = "adapter"
_BASE_TYPE = "q8_0"
# Ollama's own default of num_ctx cuts long conversations; a longer one takes memory at once.
_CONTEXT_TOKENS = 8192


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    from finegraft.export import _save, gguf, gguf_lora

    own, rest = _split(options)
    try:
        origin = open_origin(source)
        kind = _one(types)
        modelfile(origin, "model.gguf", **rest)
        if kind != ADAPTER:
            _refuse_base(own)
            return gguf.problems(_save.gguf_source(origin), path, [kind])
        gguf_lora.check(origin)
        if own.get("base"):
            return []
        kind = own.get("base_type") or _BASE_TYPE
        return gguf.problems(_save.gguf_source(origin.base_origin), path, [kind])
    except (ExportError, ConfigError) as error:
        return [error]


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of ``ollama:adapter`` alone, and the others."""
    own = {k: v for k, v in options.items() if k in ("base", "base_type")}
    return own, {k: v for k, v in options.items() if k not in own}


def _refuse_base(own: Mapping[str, Any]) -> None:
    if any(value is not None for value in own.values()):
        raise ExportError(
            "FG-EXPORT-047",
            "a base is named for an export that has the base in its weights",
            allowed="base and base_type with ollama:adapter",
            fix="--to ollama:adapter, or leave the base out",
        )


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
    base: str | None = None,
    base_type: str | None = None,
) -> list[Written]:
    """Write the weights and the Modelfile.

    Args:
        source: A run, adapter or model folder, or (model, tokenizer).
        path: The folder.
        types: One type of GGUF, or ``adapter``.
        system: System text of conversations that bring none; None: as the chat template has it.
        temperature: None: as the model's generation settings have it.
        num_ctx: Longest conversation in tokens; None: what the model knows, at most 8,192.
        base: For ``adapter``, what Ollama calls the base, ``smollm2:135m`` say; None: its weights
            are written beside the adapter.
        base_type: For ``adapter``, the type of GGUF of those weights; None: q8_0.

    Raises:
        ExportError: FG-EXPORT-047 a base for a merged export, FG-EXPORT-070 no chat template,
            FG-EXPORT-071 one that Ollama cannot express, FG-EXPORT-072 several types, FG-EXPORT-073
            a system text that no Modelfile can hold; and those of ``export.gguf`` and
            ``export.gguf_lora``.
    """
    origin, kind, folder = open_origin(source), _one(types), Path(path)
    if kind == ADAPTER:
        record, weights = _write_adapter(origin, folder, base, base_type)
    else:
        from finegraft.export import _save, gguf

        _refuse_base({"base": base, "base_type": base_type})
        [record] = gguf.write(_save.gguf_source(origin), folder, [kind])
        weights = f"./{record.file.name}"
    adapter = record.file.name if kind == ADAPTER else None
    text = modelfile(
        origin, weights, adapter=adapter, system=system, temperature=temperature, num_ctx=num_ctx
    )
    write_whole(folder / MODELFILE, text)
    beside = (*record.beside, folder / MODELFILE)
    return [dataclasses.replace(record, type=kind, beside=beside)]


def _write_adapter(
    origin: Origin, folder: Path, base: str | None, base_type: str | None
) -> tuple[Written, str]:
    """Write the adapter and, unless Ollama has it, the base; what FROM names."""
    from finegraft.export import _save, gguf, gguf_lora

    [record] = gguf_lora.write(origin, folder)
    if base:
        return record, base
    weights = _save.gguf_source(origin.base_origin)
    [beside] = gguf.write(weights, folder, [base_type or _BASE_TYPE])
    return dataclasses.replace(record, beside=(beside.file,)), f"./{beside.file.name}"


def modelfile(
    origin: Origin,
    weights: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    num_ctx: int | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        weights: What FROM names: ``./file.gguf`` beside it, or a model that Ollama has.
        adapter: Name of a GGUF adapter beside it.
        system, temperature, num_ctx: As for ``write``.

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
    lines += [f"FROM {weights}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    lines += [f'TEMPLATE """{turns.go()}"""']
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

    found = {name: kind.summary for name, kind in FILE_TYPES.items()}
    return {**found, ADAPTER: "the LoRA alone, beside the GGUF of its base"}


FORMAT = Format(
    summary="GGUF and a Modelfile for `ollama create`",
    variants=_variants(),
    options={
        "system": "text of conversations that bring none",
        "temperature": "of answers",
        "num_ctx": "longest conversation, in tokens",
        "base": "for adapter: what Ollama calls the base; unset, its weights are written",
        "base_type": "for adapter: the type of those weights, q8_0 by default",
    },
    problems=problems,
    write=write,
    verify=verify,
)
