"""Unsloth's names for exporting and uploading, bound to one model.

What: ``bind`` gives a model in memory ``save_pretrained_merged``, ``save_pretrained_gguf``,
``push_to_hub_merged`` and ``push_to_hub_gguf``. How: ``export._save`` writes and verifies,
``export._push`` uploads. Constraint: name, token and network are looked at before anything is
written, and nothing is uploaded that failed its verification. Trade-off: an upload writes the whole
export to a temporary folder first; it is kept where the upload fails, and the error names it.
"""

from __future__ import annotations

import shutil
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finegraft.core.arguments import Drop, translate
from finegraft.export import _push, _save

# Unsloth's words for types of GGUF.
_TYPES = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
_METHODS = {"merged_4bit_forced": "merged_4bit"}
_MERGING = {
    "state_dict": Drop("the model's own weights are written"),
    "is_main_process": Drop("one process writes"),
    "safe_serialization": Drop("weights are always safetensors"),
    "variant": Drop("files have their usual names"),
    "save_peft_format": Drop("save_method='lora' writes peft's format"),
    "tags": Drop("the model card has its own"),
    "temporary_location": Drop("nothing is written but the result"),
    "maximum_memory_usage": Drop("weights are written one shard at a time"),
    "datasets": Drop("the model card has its own"),
}
_GGUF = {**_MERGING, "first_conversion": Drop("each type is made from the merged weights")}
_PUSHING = {
    "use_temp_dir": Drop("the files are written to a temporary folder"),
}
_TARGET = ("private", "commit_message", "commit_description", "create_pr", "revision")


def save_pretrained_merged(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: str | int = "5GB",
    dtype: Any = None,
    verify: bool = True,
    push_to_hub: bool = False,
    token: str | None = None,
    **more: Any,
) -> Path:
    """Write this model with its adapter merged, or the adapter alone.

    Args:
        save_directory: A new folder, or an earlier export, which is replaced.
        tokenizer: None: the one in the folder that the model was loaded from.
        save_method: ``merged_16bit``, ``merged_4bit`` or ``lora``.
        max_shard_size: Largest weight file.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None: what the base was published in.
        verify: Reload it and compare it with this model.
        push_to_hub: Upload it as well, to ``repo_id`` or to the name of the folder.
        token: For the upload; None: ``HF_TOKEN`` or the stored login.
        more: For the upload ``repo_id``, ``private``, ``commit_message``, ``commit_description``,
            ``create_pr`` and ``revision``; names of Unsloth's that mean nothing here.

    Raises:
        ExportError: FG-EXPORT-030 to FG-EXPORT-039.
        HubError: those of ``push_to_hub_merged``.
    """
    uploading = _upload_settings(more, push_to_hub)
    translate("save_pretrained_merged", more, (), {**_MERGING, **_PUSHING})
    target = _target_of(save_directory, token, uploading) if push_to_hub else None
    options = {"max_shard_size": max_shard_size, "dtype": dtype}
    done = _written(
        self, tokenizer, save_directory, [_method(save_method)], verify, options, _name(target)
    )
    if target:
        _push.upload(target, _push.plan(done[0].path, verified=verify))
    return done[0].path


def save_pretrained_gguf(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    verify: bool = True,
    push_to_hub: bool = False,
    token: str | None = None,
    **more: Any,
) -> list[Path]:
    """Write this model with its adapter merged as GGUF, several types in one pass.

    Args:
        save_directory: The folder of the files.
        tokenizer: None: the one in the folder that the model was loaded from.
        quantization_method: One or more of ``q8_0``, ``q4_k_m``, ``f16``, ...
        verify: Load each with llama.cpp and compare it with this model.
        push_to_hub: Upload them as well, to ``repo_id`` or to the name of the folder.
        token: For the upload; None: ``HF_TOKEN`` or the stored login.
        more: As for ``save_pretrained_merged``.

    Raises:
        ExportError: those of ``export.gguf``, FG-EXPORT-036, FG-EXPORT-038.
        HubError: those of ``push_to_hub_gguf``.
    """
    uploading = _upload_settings(more, push_to_hub)
    translate("save_pretrained_gguf", more, (), {**_GGUF, **_PUSHING})
    target = _target_of(save_directory, token, uploading) if push_to_hub else None
    done = _written(
        self, tokenizer, save_directory, _gguf(quantization_method), verify, {}, _name(target)
    )
    if target:
        only = done[0].files
        _push.upload(target, _push.plan(done[0].path.parent, verified=verify, only=only))
    return [one.path for one in done]


def push_to_hub_merged(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    token: str | None = None,
    private: bool | None = None,
    max_shard_size: str | int = "5GB",
    dtype: Any = None,
    verify: bool = True,
    **more: Any,
) -> str:
    """Write, verify and upload this model with its adapter merged, or the adapter alone.

    Args:
        repo_id: ``owner/name``; it is made where it is missing.
        tokenizer: None: the one in the folder that the model was loaded from.
        save_method: ``merged_16bit``, ``merged_4bit`` or ``lora``.
        token: None: ``HF_TOKEN`` or the stored login.
        private: Of a repository that is made; None: as its owner's default is.
        max_shard_size: Largest weight file.
        dtype: As for ``save_pretrained_merged``.
        verify: Reload it and compare it with this model; False uploads it unproven.
        more: ``commit_message``, ``commit_description``, ``create_pr``, ``revision``; names of
            Unsloth's that mean nothing here.

    Returns:
        The address of the repository.

    Raises:
        ExportError: FG-EXPORT-030 to FG-EXPORT-039.
        HubError: FG-HUB-001 to FG-HUB-013, see docs/errors.md.
    """
    uploading = _upload_settings({**more, "private": private}, True)
    rest = {k: v for k, v in more.items() if k not in _TARGET}
    translate("push_to_hub_merged", rest, (), {**_MERGING, **_PUSHING})
    target = _push.open_target(repo_id, token=token, **uploading)
    options = {"max_shard_size": max_shard_size, "dtype": dtype}
    return _pushed(self, tokenizer, target, [_method(save_method)], verify, options)


def push_to_hub_gguf(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    token: str | None = None,
    private: bool | None = None,
    verify: bool = True,
    **more: Any,
) -> str:
    """Write, verify and upload this model with its adapter merged as GGUF.

    Args:
        repo_id: ``owner/name``; it is made where it is missing.
        quantization_method: One or more of ``q8_0``, ``q4_k_m``, ``f16``, ...
        verify: Load each with llama.cpp and compare it with this model; False uploads it unproven.
        tokenizer, token, private, more: As for ``push_to_hub_merged``.

    Returns:
        The address of the repository.

    Raises:
        ExportError: those of ``save_pretrained_gguf``.
        HubError: FG-HUB-001 to FG-HUB-013, see docs/errors.md.
    """
    uploading = _upload_settings({**more, "private": private}, True)
    rest = {k: v for k, v in more.items() if k not in _TARGET}
    translate("push_to_hub_gguf", rest, (), {**_GGUF, **_PUSHING, "max_shard_size": _ONE_FILE})
    target = _push.open_target(repo_id, token=token, **uploading)
    return _pushed(self, tokenizer, target, _gguf(quantization_method), verify, {})


_ONE_FILE = Drop("a GGUF file is not split")


def _name(target: _push.Target | None) -> str | None:
    return target.repo if target else None


def _method(name: str) -> str:
    name = str(name).lower().replace("-", "_").replace(" ", "_")
    return _METHODS.get(name, name)


def _gguf(types: str | Sequence[str]) -> list[str]:
    listed = [types] if isinstance(types, str) else types
    return [f"gguf:{_TYPES.get(str(kind).lower(), str(kind).lower())}" for kind in listed]


def _upload_settings(more: dict[str, Any], wanted: bool) -> dict[str, Any]:
    """The attributes of ``Target`` in ``more``, which loses them where an upload is ``wanted``."""
    if not wanted:
        return {}
    found = {name: more.pop(name) for name in (*_TARGET, "repo_id") if name in more}
    renamed = {"commit_message": "message", "commit_description": "description"}
    return {renamed.get(name, name): value for name, value in found.items()}


def _target_of(folder: str | Path, token: str | None, settings: dict[str, Any]) -> _push.Target:
    """The repository of ``push_to_hub=True``: named, else called like the folder."""
    text = str(folder)
    called = text if text.count("/") == 1 and text[0] not in "./~" else Path(text).name
    repo = settings.pop("repo_id", None) or called
    return _push.open_target(repo, token=token, **settings)


def _written(
    model: Any,
    tokenizer: Any,
    place: Any,
    to: list[str],
    verify: bool,
    options: dict[str, Any],
    repo: str | None = None,
) -> list[_save.Exported]:
    options = {k: v for k, v in options.items() if v is not None}
    done = _save.export((model, tokenizer), place, to, verify=verify, options=options, repo=repo)
    _save.require_verified(done)
    return done


def _pushed(
    model: Any,
    tokenizer: Any,
    target: _push.Target,
    to: list[str],
    verify: bool,
    options: dict[str, Any],
) -> str:
    folder = Path(tempfile.mkdtemp(prefix="finegraft-")) / target.repo.rpartition("/")[2]
    _written(model, tokenizer, folder, to, verify, options, target.repo)
    url = _push.upload(target, _push.plan(folder, verified=verify)).url
    shutil.rmtree(folder.parent, ignore_errors=True)
    return url


BOUND = (save_pretrained_merged, save_pretrained_gguf, push_to_hub_merged, push_to_hub_gguf)


def bind(model: Any) -> Any:
    """Give this one model Unsloth's names for exporting, and return it."""
    for function in BOUND:
        setattr(model, function.__name__, types.MethodType(function, model))
    return model
