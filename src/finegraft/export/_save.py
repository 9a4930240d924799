"""Write exports and verify them.

What: ``export`` writes a run or model in any number of formats. How: formats are found by name in
``FORMATS``; everything that stands in the way is found before anything is written. Constraint: no
folder is replaced but an earlier export, and none is left without ``verification.json``. Trade-off:
verifying takes longer than writing.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finegraft.core.errors import ExportError, did_you_mean
from finegraft.export import FORMATS, _card, _verify
from finegraft.export._manifests import ADAPTERS
from finegraft.export._origin import Origin, open_origin
from finegraft.export._verify import contents
from finegraft.export._verify.report import FILE, Report
from finegraft.export._weights import open_plain

logger = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]
_DEFAULT_TYPE = {"gguf": "q8_0", "gguf_lora": "f32", "ollama": "q8_0", "vllm": "merged"}
_INTO_A_FOLDER = ("gguf", "gguf_lora", "ollama")  # files are added to what is there


@dataclass(frozen=True)
class Exported:
    """One format that was written.

    Attributes:
        format: ``merged_16bit``, ``lora``, ``gguf:q8_0``, ...
        path: The folder or file.
        bytes: Its size.
        report: What verifying it gave.
        files: All that was written, the model card among them.
    """

    format: str
    path: Path
    bytes: int
    report: Report
    files: tuple[Path, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether it was compared and agreed."""
        return self.report.verified


def parse(to: str | Sequence[str]) -> dict[str, list[str]]:
    """Read ``gguf:q4_k_m,merged-16bit``: types by format.

    Raises:
        ConfigError: FG-CORE-001, an unknown format.
        ExportError: FG-EXPORT-036 an unknown type, FG-EXPORT-039 no format at all.
    """
    words = to.split(",") if isinstance(to, str) else list(to)
    found: dict[str, list[str]] = {}
    for word in (w.strip() for w in words if w.strip()):
        name, _, kind = word.partition(":")
        name = name.lower().replace("-", "_")
        variants = FORMATS.get(name).variants
        kind = (kind or _DEFAULT_TYPE.get(name, "")).lower().replace("-", "_")
        if kind and kind not in variants:
            raise ExportError(
                "FG-EXPORT-036",
                f"{name} has no type '{kind}'",
                allowed=", ".join(variants) or f"{name} without a type",
                fix=did_you_mean(kind, variants) if variants else f"--to {name}",
            )
        listed = found.setdefault(name, [])
        if kind and kind not in listed:
            listed.append(kind)
    if not found:
        raise ExportError(
            "FG-EXPORT-039",
            "no format is named",
            allowed=", ".join(FORMATS.names()),
            fix="--to merged-16bit, or several: --to gguf:q4_k_m,gguf:q8_0,lora",
        )
    return found


def export(
    source: Any,
    output: str | Path,
    to: str | Sequence[str],
    *,
    verify: bool = True,
    listener: Listener | None = None,
    options: Mapping[str, Any] | None = None,
    repo: str | None = None,
) -> list[Exported]:
    """Write ``source`` in every format of ``to``.

    Args:
        source: A run, adapter or model folder, a hub name, or (model, tokenizer).
        output: A folder; several formats get a folder each inside.
        to: ``merged_16bit``, ``merged_4bit``, ``lora``, ``gguf:q8_0``, ...; separated by commas.
        verify: Reload what was written and compare it with ``source``.
        listener: Called with an event for each step.
        options: Keywords of the formats' ``write``, each given to the formats that have it.
        repo: What model cards call the export, ``owner/name`` of an upload; None: the folder.

    Returns:
        What was written, each with its report; one that failed is among them.

    Raises:
        ExportError: FG-EXPORT-036, FG-EXPORT-037 a folder with other things in it, FG-EXPORT-039;
            and those of the formats.
    """
    wanted, origin = parse(to), open_origin(source)
    output = Path(output)
    places = {n: output / n.replace("_", "-") if len(wanted) > 1 else output for n in wanted}
    for name, place in places.items():
        _require_replaceable(place, name)
        problems = FORMATS.get(name).problems(
            _given(name, origin), place, wanted[name], **_own(name, options)
        )
        if problems:
            raise problems[0]
    tell = listener or (lambda event: None)
    done: list[Exported] = []
    for name, kinds in wanted.items():
        tell({"type": "phase", "name": f"writing {', '.join(_named(name, kinds))}"})
        started = time.monotonic()
        written = FORMATS.get(name).write(
            _given(name, origin), places[name], kinds, **_own(name, options)
        )
        seconds = round(time.monotonic() - started, 1)
        reports = []
        for record in written:
            label = f"{name}:{record.type}" if kinds else name
            tell(
                {
                    "type": "written",
                    "format": label,
                    "path": record.file,
                    "bytes": record.bytes,
                    "seconds": seconds,
                }
            )
            reports.append(_verified(record.file, label, origin, verify, tell))
            done.append(Exported(label, record.file, record.bytes, reports[-1]))
        files = [record.file.name for record in written if record.file.is_file()]
        card = _card.write(origin, places[name], name, reports, files, repo)
        own = [*contents.of(written), *([card] if card else [])]
        contents.note(places[name], own)
        fresh = len(written)
        done[-fresh:] = [dataclasses.replace(one, files=tuple(own)) for one in done[-fresh:]]
    return done


def _named(name: str, kinds: Sequence[str]) -> list[str]:
    return [f"{name}:{kind}" for kind in kinds] or [name]


def _own(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = FORMATS.get(name).options
    return {key: value for key, value in (options or {}).items() if key in known}


def _given(name: str, origin: Origin) -> Any:
    """What a format's functions are given for ``origin``."""
    return gguf_source(origin) if name == "gguf" else origin


def gguf_source(origin: Origin) -> Any:
    """The merged weights of ``origin`` as the GGUF writer takes them, unread."""
    from finegraft.export.gguf.source import Source

    # bfloat16 would lose updates below half a step of a weight: F16 then had 0.9 of the adapter
    plain = open_plain(origin, torch.float32 if origin.adapted else None)
    settings = plain.generation or plain.config
    ends = getattr(settings, "eos_token_id", None)
    ends = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    name = origin.run.name if origin.run else Path(plain.name).name
    return Source(plain.config, plain.tokenizer, plain.tensors, name, None, ends)


def _require_replaceable(place: Path, name: str) -> None:
    """Raises ExportError FG-EXPORT-037 where a folder would be replaced that is no export."""
    if name in _INTO_A_FOLDER or not place.exists():
        return
    inside = sorted(p.name for p in place.iterdir()) if place.is_dir() else [place.name]
    own = FILE in inside and not any(
        (p.is_dir() and p.name != ADAPTERS) or p.suffix == ".gguf" for p in place.iterdir()
    )
    if inside and not own:
        raise ExportError(
            "FG-EXPORT-037",
            f"{place} holds {', '.join(inside[:5])}{' ...' if len(inside) > 5 else ''}, "
            "which is no earlier export",
            allowed="a new or empty folder, or one that an export made",
            fix="choose another folder with --output",
        )


def _verified(file: Path, label: str, origin: Origin, wanted: bool, tell: Listener) -> Report:
    against = _verify.absolute(origin.name)
    if not wanted:
        report = Report(file, label, against, missing="it was not asked for")
    else:
        tell({"type": "phase", "name": f"verifying {file.name}"})
        try:
            report = _verify.verify(file, origin, mark=False)
        except ExportError as error:
            if error.code != "FG-EXPORT-041":
                raise
            report = Report(file, label, against, missing=f"{error.found} ({error.fix})")
            logger.warning("%s", report.missing)
    _verify.mark(report)
    tell({"type": "verified", "report": report})
    return report


def require_verified(exported: Sequence[Exported]) -> None:
    """Raise for an export that was compared and is not what was trained.

    Raises:
        ExportError: FG-EXPORT-038.
    """
    for one in exported:
        if not one.verified and one.report.missing is None:
            raise ExportError(
                "FG-EXPORT-038",
                f"{one.path} is not what was trained: {one.report.cause}",
                allowed="an export whose every check passes",
                fix=f"see {FILE} beside it; finegraft verify {one.path} --against RUN checks again",
            )
