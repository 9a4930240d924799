"""File types of GGUF and which tensor gets which type in them.

What: ``FILE_TYPES`` by name; ``choose`` gives every tensor of a model its type. How: a file type
is one base type and a few rules for tensors that deserve more bits, the ones that llama.cpp's
quantizer applies, so that a file is byte for byte what llama.cpp would have made. Constraint: rows
that a type cannot hold (a length that is no multiple of its block) get the next type that can.
Trade-off: small hidden sizes (576 of SmolLM2) therefore end up larger than the name says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from finegraft.core.errors import ExportError, near


@dataclass(frozen=True)
class Layout:
    """What the rules look at.

    Attributes:
        architecture: GGUF's name of it.
        layers: How many there are.
        heads_per_key: Query heads that share one key head.
        has_output: Whether the file has a head of its own, ``output.weight``.
    """

    architecture: str
    layers: int
    heads_per_key: int
    has_output: bool

    @property
    def is_70b(self) -> bool:
        """llama.cpp's name for 80 layers with grouped queries; its few value heads get 5 bits."""
        grouped = self.heads_per_key > 1 or self.architecture == "qwen2"
        return self.layers == 80 and grouped and self.architecture in ("llama", "qwen2")


# (layer, layout) -> type, or None for the base type
Rule = Callable[[int, Layout], Type | None]


@dataclass(frozen=True)
class FileType:
    """One name that a user can ask for.

    Attributes:
        id: The number that stands in the file.
        base: The type of most matrices.
        summary: One line for help texts.
        rules: Exceptions by kind of tensor: ``v`` (also fused qkv), ``out``, ``down``.
    """

    id: LlamaFileType
    base: Type
    summary: str
    rules: Mapping[str, Rule] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name as files carry it, ``Q4_K_M``."""
        return self.id.name.partition("_")[2]


def _edge(layer: int, layout: Layout) -> bool:
    """The first and last eighth of the layers and every third between get more bits."""
    eighth = layout.layers // 8
    return layer < eighth or layer >= 7 * layout.layers // 8 or (layer - eighth) % 3 == 2


def _always(kind: Type) -> Rule:
    return lambda layer, layout: kind


def _edges(kind: Type) -> Rule:
    return lambda layer, layout: kind if _edge(layer, layout) else None


def _first(count: Callable[[Layout], int], kind: Type, rest: Type | None = None) -> Rule:
    return lambda layer, layout: kind if layer < count(layout) else rest


def _q2_values(layer: int, layout: Layout) -> Type:
    return Type.Q4_K if layout.heads_per_key >= 4 else Type.Q3_K


_MORE = {"v": _edges(Type.Q6_K), "down": _edges(Type.Q6_K)}
FILE_TYPES: dict[str, FileType] = {
    "f32": FileType(LlamaFileType.ALL_F32, Type.F32, "32-bit floats, for comparing"),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Type.F16, "16-bit floats, runs everywhere"),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Type.BF16, "bfloat16, exact for most models"),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Type.Q8_0, "8.5 bits, no measurable loss"),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, Type.Q6_K, "6.6 bits"),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K, "5.7 bits", _MORE),
    "q5_k_s": FileType(LlamaFileType.MOSTLY_Q5_K_S, Type.Q5_K, "5.5 bits"),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K, "4.8 bits, the usual choice", _MORE),
    "q4_k_s": FileType(
        LlamaFileType.MOSTLY_Q4_K_S,
        Type.Q4_K,
        "4.6 bits",
        {"v": _first(lambda _: 4, Type.Q5_K), "down": _first(lambda s: s.layers // 8, Type.Q5_K)},
    ),
    "q3_k_m": FileType(
        LlamaFileType.MOSTLY_Q3_K_M,
        Type.Q3_K,
        "3.9 bits, for large models",
        {
            "v": _first(lambda _: 2, Type.Q5_K, Type.Q4_K),
            "down": _first(lambda s: s.layers // 16, Type.Q5_K, Type.Q4_K),
            "out": _always(Type.Q4_K),
        },
    ),
    "q2_k": FileType(
        LlamaFileType.MOSTLY_Q2_K,
        Type.Q2_K,
        "2.9 bits, a clear loss",
        {"v": _q2_values, "down": _always(Type.Q3_K), "out": _always(Type.Q3_K)},
    ),
    "q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, Type.Q5_1, "6 bits, older layout"),
    "q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, Type.Q5_0, "5.5 bits, older layout"),
    "q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, Type.Q4_1, "5 bits, older layout"),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Type.Q4_0, "4.5 bits, fast on CPUs"),
}
FLOATS = (Type.F32, Type.F16, Type.BF16)
# What a row gets that is no multiple of 256 long.
_NARROW = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
_KINDS = {"attn_v": "v", "attn_qkv": "v", "attn_output": "out", "ffn_down": "down"}
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ALWAYS_F32 = ("position_embd.weight", "token_types.weight")


def find(name: str) -> tuple[str, FileType]:
    """Return the file type that ``name`` means, in any case, ``-`` or ``_``, and its own name.

    Raises:
        ExportError: FG-EXPORT-001, no such type.
    """
    plain = str(name).lower().replace("-", "_").removeprefix("mostly_").removeprefix("all_")
    if plain in FILE_TYPES:
        return plain, FILE_TYPES[plain]
    close = near(plain, FILE_TYPES)
    raise ExportError(
        "FG-EXPORT-001",
        f"unknown GGUF type '{name}'",
        allowed=", ".join(FILE_TYPES),
        fix=f"did you mean '{close}'?" if close else "q8_0 keeps all, q4_k_m is small",
    )


def stays_float(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is stored in 32-bit floats whatever the file's type."""
    return (
        len(shape) < 2
        or not name.endswith(".weight")
        or name.endswith("_norm.weight")
        or (name in _ALWAYS_F32)
    )


def row_bytes(kind: Type, length: int) -> int:
    """Bytes that one row of ``length`` numbers takes."""
    block, size = GGML_QUANT_SIZES[kind]
    return length // block * size


def choose(
    tensors: Iterable[tuple[str, tuple[int, ...]]], file_type: FileType, layout: Layout
) -> dict[str, Type]:
    """Return the type of every tensor.

    Args:
        tensors: Name in the file and shape, rows first.
    """
    return {name: _type_of(name, shape, file_type, layout) for name, shape in tensors}


def _type_of(name: str, shape: tuple[int, ...], file_type: FileType, layout: Layout) -> Type:
    if stays_float(name, shape):
        return Type.F32
    base, columns = file_type.base, shape[-1]
    if base in FLOATS:
        return base
    is_head = name == "output.weight" or (name == "token_embd.weight" and not layout.has_output)
    if is_head:
        fits = columns % GGML_QUANT_SIZES[base][0] == 0
        return _fitting(Type.Q6_K if fits and base != Type.Q8_0 else Type.Q8_0, columns)
    return _fitting(_ruled(name, file_type, layout) or base, columns)


def _ruled(name: str, file_type: FileType, layout: Layout) -> Type | None:
    place = _IN_LAYER.fullmatch(name)
    kind = _KINDS.get(place[2]) if place else None
    if place is None or kind is None:
        return None
    rule = file_type.rules.get(kind)
    found = rule(int(place[1]), layout) if rule else None
    if kind == "v" and layout.is_70b and (found or file_type.base) in (Type.Q3_K, Type.Q4_K):
        return Type.Q5_K
    return found


def _fitting(kind: Type, columns: int) -> Type:
    """``kind``, or the nearest type whose blocks fill a row of ``columns``."""
    if columns % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    kind = _NARROW.get(kind, kind)
    return kind if columns % GGML_QUANT_SIZES[kind][0] == 0 else Type.F16
