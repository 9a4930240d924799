"""A folder for vLLM, with the command that serves it.

What: a merged model (``vllm:merged``) or the adapter alone (``vllm:adapter``), and ``serve.sh``.
How: the two formats ``merged_16bit`` and ``lora`` write the folder; the command is derived from
what they wrote. Constraint: adapters that vLLM cannot serve beside a base are refused before
anything is written. Trade-off: vLLM is not installed here; nothing but the files is checked.

Source: https://docs.vllm.ai/en/latest/features/lora.html
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finegraft.core.errors import ExportError, FinegraftError
from finegraft.core.paths import write_whole
from finegraft.export import _verify, lora, merged_16bit
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import Origin, open_origin
from finegraft.models import packaged
from finegraft.models.locate import locate

SCRIPT = "serve.sh"
VARIANTS = {
    "merged": "one model, its adapter merged in",
    "adapter": "a LoRA that vLLM loads beside the base",
}
# Values that --max-lora-rank takes.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def problems(
    source: Any, path: str | Path, types: Sequence[str] = (), **options: Any
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    try:
        if _one(types) == "merged":
            return merged_16bit.problems(source, path, (), **options)
        found = lora.problems(source, path)
        if not found:
            _require_servable(_settings(open_origin(source)))
        return found
    except FinegraftError as error:
        return [error]


def _one(types: Sequence[str]) -> str:
    if len(types) == 1:
        return types[0]
    raise ExportError(
        "FG-EXPORT-074",
        f"{len(types)} kinds of vLLM folder: {', '.join(types) or 'none'}",
        allowed="vllm:merged or vllm:adapter",
        fix="export once for each, with another --output",
    )


def _settings(origin: Origin) -> dict[str, Any]:
    """The configuration of the adapter, as peft saves it."""
    if origin.in_memory is not None:
        model = origin.in_memory
        found: dict[str, Any] = model.peft_config[model.active_adapters[0]].to_dict()
        return {k: getattr(v, "value", v) for k, v in found.items()}
    return dict(
        json.loads((origin.located.path / "adapter_config.json").read_text(encoding="utf-8"))
    )


def _require_servable(settings: dict[str, Any]) -> None:
    """Raises ExportError FG-EXPORT-075 for an adapter that vLLM has no kernels for."""
    reasons = {
        f"its method is {settings.get('peft_type')}": settings.get("peft_type") != "LORA",
        "it is a DoRA": settings.get("use_dora"),
        "it trains biases": settings.get("bias", "none") != "none",
        "it trains whole modules": settings.get("modules_to_save"),
        "it has new tokens": settings.get("trainable_token_indices"),
        "it trains experts by parameter": settings.get("target_parameters"),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ExportError(
            "FG-EXPORT-075",
            f"vLLM cannot load this adapter beside its base: {', '.join(found)}",
            allowed="a plain LoRA",
            fix="--to vllm:merged writes one model with the adapter in it",
        )


def write(source: Any, path: str | Path, types: Sequence[str], **options: Any) -> list[Written]:
    """Write the folder and ``serve.sh``.

    Args:
        source: A run, adapter or model folder, or (model, tokenizer).
        path: The folder; an older one there is replaced.
        types: ``merged`` or ``adapter``.
        options: Of ``merged_16bit``, for ``merged``.

    Raises:
        ExportError: FG-EXPORT-074 not one kind, FG-EXPORT-075 an adapter that vLLM cannot load; and
            those of ``merged_16bit`` and ``lora``.
    """
    origin, kind, final = open_origin(source), _one(types), Path(path)
    if kind == "merged":
        written = merged_16bit.write(origin, final, (), **options)
        command = ["vllm", "serve", "."]
    else:
        settings = _settings(origin)
        _require_servable(settings)
        written = lora.write(origin, final)
        ranks = [settings["r"], *(settings.get("rank_pattern") or {}).values()]
        rank = next((r for r in _RANKS if r >= max(ranks)), max(ranks))
        command = ["vllm", "serve", _base(origin), "--enable-lora"]
        command += ["--lora-modules", f"{_name(origin)}=.", "--max-lora-rank", str(rank)]
        if (final / "chat_template.jinja").is_file():
            command += ["--chat-template", "./chat_template.jinja"]
    if kind == "merged":
        command += ["--served-model-name", _name(origin)]
    text = f'#!/bin/sh\ncd "$(dirname "$0")" && exec {shlex.join(command)} "$@"\n'
    write_whole(final / SCRIPT, text)
    (final / SCRIPT).chmod(0o755)
    return [Written(final, kind, merged_16bit.folder_bytes(final)) for _ in written]


def _base(origin: Origin) -> str:
    """The base as vLLM opens it: its name on the hub, else the folder where it lies here."""
    name = origin.full_base
    here = Path(name).exists() or name in packaged.names()
    return str(locate(name).path) if here else name


def _name(origin: Origin) -> str:
    """What clients call the model."""
    return origin.run.name if origin.run else Path(origin.name).name or "tuned"


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Open the folder with transformers or peft and compare, see ``export._verify``."""
    return _verify.verify(file, source, mark=False).checks


FORMAT = Format(
    summary="a folder for vLLM with the command that serves it",
    variants=VARIANTS,
    options=merged_16bit.FORMAT.options,
    problems=problems,
    write=write,
    verify=verify,
)
