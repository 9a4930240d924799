"""What goes into a file, before anything is written.

What: ``make`` lists the tensors with their names and shapes in the file, says how each is read, and
reads the tokenizer. How: nothing is loaded but headers; a tensor's values come when its turn is.
Constraint: every weight of the model has a place or the plan fails, and every layer is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter, PoolingType

from finegraft.core.errors import ExportError
from finegraft.export.gguf import architectures, types, vocabulary
from finegraft.export.gguf.architectures import Architecture
from finegraft.export.gguf.source import Source
from finegraft.export.gguf.vocabulary import Vocabulary

POOLINGS = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "last": PoolingType.LAST}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: In the file.
        shape: Rows first.
        read: Returns the values as they are stored, in a float dtype.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """One model, ready to be written in any type."""

    source: Source
    architecture: Architecture
    entries: list[Entry]
    vocabulary: Vocabulary
    layout: types.Layout
    pooling: PoolingType | None

    def renamed(self, name: str) -> Plan:
        """The same plan for a model called ``name``."""
        return replace(self, source=replace(self.source, name=name))

    def kinds(self, file_type: types.FileType) -> dict[str, gguf.GGMLQuantizationType]:
        """The type of every tensor in a file of ``file_type``."""
        shapes = [(entry.name, entry.shape) for entry in self.entries]
        return types.choose(shapes, file_type, self.layout)

    def write_facts(self, writer: GGUFWriter, file_type: types.FileType) -> None:
        """Add every key of the file."""
        config = self.source.config
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.vocabulary.model_name(self.source.name))
        self.architecture.write(writer, config)
        if self.pooling is not None:
            writer.add_pooling_type(self.pooling)
        if self.pooling is PoolingType.RANK:
            labels = getattr(config, "id2label", None) or {}
            writer.add_classifier_output_labels([str(labels[i]) for i in sorted(labels)])
        writer.add_file_type(file_type.id)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.vocabulary.write(writer)


def make(source: Source, *, pre_tokenizer: str | None = None, pooling: str | None = None) -> Plan:
    """Return the plan for ``source``.

    Args:
        pre_tokenizer: llama.cpp's name for how a byte-level tokenizer splits; None: found out.
        pooling: ``mean``, ``cls`` or ``last``, how an encoder makes one vector of a text; None:
            what the folder's ``modules.json`` says, if it has one.

    Raises:
        ExportError: FG-EXPORT-003 unknown family, FG-EXPORT-009 a weight without a place or a
            place without a weight, FG-EXPORT-010 a setting that llama.cpp lacks, FG-EXPORT-013
            an unknown pooling; and those of ``vocabulary.read``.
    """
    config = source.config
    architecture = architectures.find(config)
    entries = _entries(source, architecture)
    names = {entry.name for entry in entries}
    _check_complete(names, architecture, config)
    rows = next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layout = types.Layout(
        architecture.name,
        config.num_hidden_layers,
        config.num_attention_heads // keys,
        "output.weight" in names,
    )
    read = vocabulary.read(source.tokenizer, rows, pre_tokenizer=pre_tokenizer, ends=source.ends)
    plan = Plan(source, architecture, entries, read, layout, _pooling(names, source, pooling))
    # what llama.cpp cannot run is found by writing the facts nowhere
    plan.write_facts(GGUFWriter(None, architecture.name), types.FILE_TYPES["f32"])
    return plan


def _entries(source: Source, architecture: Architecture) -> list[Entry]:
    config = source.config
    found = [
        Entry(name, tuple(value.shape), lambda value=value: value)
        for name, value in architecture.extra(config).items()
    ]
    for name, value in _wanted(source, architecture).items():
        place = architectures.place(architecture, name, config)
        if place is not None:
            found.append(Entry(place, tuple(value.shape), _reader(place, value, source)))
    return found


def _wanted(source: Source, architecture: Architecture) -> dict[str, Any]:
    """The model's tensors without those that only another head would use."""
    names = {name.removeprefix("bert.") for name in source.tensors}
    if architecture.name != "bert":
        return dict(source.tensors)
    if "classifier.weight" not in names:
        return {name: value for name, value in source.tensors.items() if "pooler." not in name}
    if "pooler.dense.weight" not in names:
        raise architectures.refuse("a label for every token", "serve it with finegraft")
    return dict(source.tensors)


def _reader(place: str, value: Any, source: Source) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        tensor = value[...].detach().cpu()
        if not tensor.is_floating_point():
            tensor = tensor.float()
        architecture = architectures.find(source.config)
        return architecture.change(place, tensor, source.config)

    return read


def _check_complete(names: set[str], architecture: Architecture, config: Any) -> None:
    layers = config.num_hidden_layers
    wanted = {"token_embd.weight"} | {
        f"blk.{layer}.{name.split('.', 2)[2]}"
        for name in names
        if name.startswith("blk.")
        for layer in range(layers)
    }
    if not getattr(config, "tie_word_embeddings", False) and architecture.untied:
        wanted.add("output.weight")
    missing = sorted(wanted - names)
    if missing or not any(name.startswith("blk.") for name in names):
        raise ExportError(
            "FG-EXPORT-009",
            f"the model lacks {', '.join(missing[:3]) or 'every layer'}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            allowed="a complete model with its head",
            fix="load it with AutoModelForCausalLM and save it again",
        )
    if "output.weight" in names and not architecture.untied:
        raise architectures.refuse("a head of its own, llama.cpp uses the embedding")


def _pooling(names: set[str], source: Source, given: str | None) -> PoolingType | None:
    if "cls.output.weight" in names:
        return PoolingType.RANK
    if given is None:
        given = _pooling_of(source.folder)
    if given is None:
        return None
    if given not in POOLINGS:
        raise ExportError(
            "FG-EXPORT-013",
            f"pooling '{given}'",
            allowed=", ".join(POOLINGS),
            fix="pooling='mean' is what most sentence encoders were trained with",
        )
    return POOLINGS[given]


def _pooling_of(folder: Path | None) -> str | None:
    """What the files of sentence-transformers beside a model say."""
    listed = folder / "modules.json" if folder else None
    if folder is None or listed is None or not listed.is_file():
        return None
    for module in json.loads(listed.read_text(encoding="utf-8")):
        if module["type"].endswith("Pooling"):
            file = folder / module["path"] / "config.json"
            settings = json.loads(file.read_text(encoding="utf-8"))
            for key, name in (
                ("pooling_mode_mean_tokens", "mean"),
                ("pooling_mode_cls_token", "cls"),
                ("pooling_mode_lasttoken", "last"),
            ):
                if settings.get(key):
                    return name
    return None
