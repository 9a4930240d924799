"""A folder for vLLM, with what serves it: a command, a compose file, a Kubernetes manifest.

What: a merged model (``vllm:merged``) or the adapter alone (``vllm:adapter``), perhaps with other
adapters of the same base (``adapters/NAME``). How: the two formats ``merged_16bit`` and ``lora``
write the folder; ``_manifests`` derives the rest from what they wrote. Constraint: adapters that
vLLM cannot serve beside a base, or beside each other, are refused before anything is written.
Trade-off: vLLM is not installed here; nothing but the files is checked.

Source: https://docs.vllm.ai/en/latest/features/lora.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finegraft.core.errors import ExportError, FinegraftError
from finegraft.core.paths import write_whole
from finegraft.export import _manifests, _verify, lora, merged_16bit
from finegraft.export._contract import Check, Format, Written
from finegraft.export._origin import Origin, open_origin
from finegraft.models import packaged
from finegraft.models.locate import locate

SCRIPT = _manifests.SCRIPT
VARIANTS = {
    "merged": "one model, its adapter merged in",
    "adapter": "a LoRA that vLLM loads beside the base",
}
# Values that --max-lora-rank takes.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def problems(
    source: Any,
    path: str | Path,
    types: Sequence[str] = (),
    also: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Exception]:
    """What ``write`` would raise, found without writing."""
    try:
        if _one(types) == "merged":
            _require_alone(also)
            return merged_16bit.problems(source, path, (), **options)
        found = lora.problems(source, path)
        if not found:
            origin = open_origin(source)
            _require_servable(_settings(origin))
            _others(origin, also)
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


def _require_alone(also: Mapping[str, str] | None) -> None:
    """Raises ExportError FG-EXPORT-076 for further adapters where none is served."""
    if also:
        raise ExportError(
            "FG-EXPORT-076",
            f"further adapters ({', '.join(also)}) beside a merged model",
            allowed="adapters beside their base",
            fix="--to vllm:adapter, or leave --also out",
        )


def _others(origin: Origin, also: Mapping[str, str] | None) -> dict[str, Origin]:
    """The further adapters, opened.

    Raises:
        ExportError: FG-EXPORT-032 there is none, FG-EXPORT-075 vLLM cannot load it, FG-EXPORT-076
            a name that cannot be one or a second time, FG-EXPORT-077 another base.
    """
    found: dict[str, Origin] = {}
    for name, place in (also or {}).items():
        if not _NAME.fullmatch(name) or name == _name(origin):
            taken = "is the first adapter's" if name == _name(origin) else "is none for a folder"
            raise ExportError(
                "FG-EXPORT-076",
                f"the name '{name}' {taken}",
                allowed="letters, digits, dots, dashes and underscores, each name once",
                fix=f"--also second={place}",
            )
        other = open_origin(place)
        lora.require_adapter(other)
        _require_servable(_settings(other))
        if _base(other) != _base(origin):
            raise ExportError(
                "FG-EXPORT-077",
                f"{place} belongs to the base {other.full_base}, not to {origin.full_base}",
                allowed="adapters of one base, which vLLM loads once",
                fix="export it into a folder of its own",
            )
        found[name] = other
    return found


def _rank(settings: Mapping[str, Any]) -> int:
    return int(max([settings["r"], *(settings.get("rank_pattern") or {}).values()]))


def write(
    source: Any,
    path: str | Path,
    types: Sequence[str],
    also: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Written]:
    """Write the folder, ``serve.sh``, ``compose.yaml`` and ``kubernetes.yaml``.

    Args:
        source: A run, adapter or model folder, or (model, tokenizer).
        path: The folder; an older one there is replaced.
        types: ``merged`` or ``adapter``.
        also: Further adapters of the same base, name to run or adapter folder, for ``adapter``.
        options: Of ``merged_16bit``, for ``merged``.

    Raises:
        ExportError: FG-EXPORT-074 not one kind, FG-EXPORT-075 an adapter that vLLM cannot load,
            FG-EXPORT-076 and FG-EXPORT-077 further adapters that cannot be served beside it; and
            those of ``merged_16bit`` and ``lora``.
    """
    origin, kind, final = open_origin(source), _one(types), Path(path)
    if kind == "merged":
        _require_alone(also)
        written = merged_16bit.write(origin, final, (), **options)
        served = _manifests.Served(_name(origin), bytes=merged_16bit.folder_bytes(final))
    else:
        served, written = _write_adapters(origin, final, also)
    for name, text in _manifests.texts(served).items():
        write_whole(final / name, text)
    (final / SCRIPT).chmod(0o755)
    return [Written(final, kind, merged_16bit.folder_bytes(final)) for _ in written]


def _write_adapters(
    origin: Origin, final: Path, also: Mapping[str, str] | None
) -> tuple[_manifests.Served, list[Written]]:
    """Write the adapter and those beside it."""
    settings = [_settings(origin)]
    _require_servable(settings[0])
    others = _others(origin, also)
    written = lora.write(origin, final)
    adapters = [(_name(origin), ".")]
    for name, other in others.items():
        place = f"{_manifests.ADAPTERS}/{name}"
        (final / _manifests.ADAPTERS).mkdir(exist_ok=True)
        lora.write(other, final / place)
        settings.append(_settings(other))
        adapters.append((name, place))
    highest = max(map(_rank, settings))
    base = _base(origin)
    served = _manifests.Served(
        name=_name(origin),
        base=base,
        base_is_here=Path(base).exists(),
        adapters=tuple(adapters),
        rank=next((r for r in _RANKS if r >= highest), highest),
        chat_template=(final / "chat_template.jinja").is_file(),
        bytes=merged_16bit.folder_bytes(final),
    )
    return served, written


def _base(origin: Origin) -> str:
    """The base as vLLM opens it: its name on the hub, else the folder where it lies here."""
    name = origin.full_base
    here = Path(name).exists() or name in packaged.names()
    return str(Path(locate(name).path).absolute()) if here else name


def _name(origin: Origin) -> str:
    """What clients call the model."""
    return origin.run.name if origin.run else Path(origin.name).name or "tuned"


def verify(source: Any, file: str | Path, **options: Any) -> list[Check]:
    """Open the folder with transformers or peft and compare, see ``export._verify``."""
    return _verify.verify(file, source, mark=False).checks


FORMAT = Format(
    summary="a folder for vLLM with the command and the manifests that serve it",
    variants=VARIANTS,
    options={
        **merged_16bit.FORMAT.options,
        "also": "further adapters of the same base, name to folder, for vllm:adapter",
    },
    problems=problems,
    write=write,
    verify=verify,
)
