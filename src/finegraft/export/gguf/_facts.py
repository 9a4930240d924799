"""What a GGUF file says of itself, for reports and diagnoses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from finegraft.core.errors import ExportError
from finegraft.export.gguf import types


@dataclass(frozen=True)
class Facts:
    """A GGUF file.

    Attributes:
        name: Of the model.
        type: One of ``FILE_TYPES``, or None.
        rows: Of the vocabulary.
        tensors: Their names.
        rope: Keys and values of the rotary embedding, without the architecture's name.
        is_model: Whether it holds a model, not an adapter.
    """

    name: str
    type: str | None
    rows: int
    tensors: frozenset[str]
    rope: dict[str, Any]
    is_model: bool


def read(file: Path) -> Facts:
    """Read the header of ``file``.

    Raises:
        ExportError: FG-EXPORT-043, not a GGUF file, or one cut off.
    """
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ExportError(
            "FG-EXPORT-043",
            f"{file} cannot be read as GGUF: {error}",
            allowed="a whole .gguf file",
            fix="export it again",
        ) from error

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    number = value("general.file_type", -1)
    label = next((n for n, kind in types.FILE_TYPES.items() if kind.id == number), None)
    is_model = value("general.type", "model") == "model"
    if not is_model and reader.tensors:
        label = reader.tensors[0].tensor_type.name.lower()  # adapters have no file type
    rope = {key.partition(".rope.")[2]: value(key) for key in reader.fields if ".rope." in key}
    return Facts(
        str(value("general.name", file.stem)),
        label,
        len(value("tokenizer.ggml.tokens", ())),
        frozenset(tensor.name for tensor in reader.tensors),
        rope,
        is_model,
    )
