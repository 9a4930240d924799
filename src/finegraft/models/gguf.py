"""A GGUF file becomes an ordinary model folder, once.

What: ``convert`` returns a safetensors folder with the weights, tokenizer, chat template and
generation settings of a GGUF file. How: the header is checked with ``gguf``, transformers
dequantises and names the tensors, and what it leaves out (digit splitting, exact constants, keys
that other tools read) is put right here. Constraint: a model loaded with ``gguf_file=`` alone can
be neither saved nor trained, so nothing else in finegraft loads one. Trade-off: disk space for two
to four times the size of the file, against 20 seconds and more at every load.

The cache key is the file's resolved path, size and modification time in nanoseconds, as ``make``
does it: hashing a 40 GB file would take minutes at every load, and a copy under another name costs
one more conversion and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import ModelError
from finegraft.models import cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CONVERSION = 1  # raise it when the folder that is written for the same file changes

# llama.cpp splits every digit off before the GPT-2 expression for these ``tokenizer.ggml.pre``;
# transformers knows the expression only, and joins the spaces before a number differently.
_DIGITS_FIRST = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)

# What a damaged file makes the reader raise: it trusts every offset and count that it finds.
_READ_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True)
class Header:
    """What is needed to know of a GGUF file before its weights are read.

    Attributes:
        architecture: ``general.architecture``.
        pre: ``tokenizer.ggml.pre``, the name of the splitting rule, empty where there is none.
        dtype: Dtype to store, by the name torch gives it.
        constants: Config keys whose float32 value in the file is meant as a short decimal.
        longest_token: Bytes of the longest token's text; 0 where the file lists none.
    """

    architecture: str
    pre: str
    dtype: str
    constants: dict[str, float]
    longest_token: int = 0


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(
        "FG-MODEL-005",
        f"{path} is not a readable GGUF file: {reason}",
        allowed="a complete GGUF file, version 2 or 3",
        fix="fetch the file again and compare its size or checksum with the publisher's",
    )


def _stored_dtype(types: set[str]) -> str:
    """Name the smallest dtype that keeps what the file holds.

    Quantised weights go to bfloat16: its rounding is 0.13% of a weight matrix's norm where 4-bit
    quantising took 5% and more. On the demo model (Q4_1) it moved the loss over 1,024 tokens from
    4.5612 to 4.5618, for half of float32's 540 MB. F16 and F32 files are kept exactly.
    """
    matrix_types = types - {"F32"} or types
    if matrix_types == {"F32"}:
        return "float32"
    return "float16" if matrix_types == {"F16"} else "bfloat16"


def read_header(path: Path) -> Header:
    """Read and check the header: magic, keys, and (the reader does) that no tensor is cut off.

    Raises:
        ModelError: FG-MODEL-005, not GGUF, damaged or cut off.
    """
    import gguf

    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
        if magic != b"GGUF":
            raise _broken(path, f"it starts with {magic!r} instead of b'GGUF'")
        reader = gguf.GGUFReader(path)

        def value(key: str, default: Any = None) -> Any:
            field = reader.get_field(key)
            return default if field is None else field.contents()

        architecture = value("general.architecture")
        types = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
        pre = value("tokenizer.ggml.pre", "")
        tokens = reader.get_field("tokenizer.ggml.tokens")
        longest = max((len(tokens.parts[i]) for i in tokens.data), default=0) if tokens else 0
        eps = value(f"{architecture}.attention.layer_norm_rms_epsilon")
    except _READ_ERRORS as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    if not architecture or not types:
        raise _broken(path, "it names no architecture or holds no tensors")
    # 1e-5 stored as float32 reads back as 9.999999747e-06
    constants = {} if eps is None else {"rms_norm_eps": float(f"{eps:.6g}")}
    return Header(str(architecture), str(pre), _stored_dtype(types), constants, longest)


def _load(path: Path, header: Header) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Before GgufConfig existed, transformers always dequantised.
    config_type = getattr(transformers, "GgufConfig", None)
    extra = {} if config_type is None else {"quantization_config": config_type(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, header.dtype), **extra
        )
    except (*_READ_ERRORS, OSError, RuntimeError) as error:
        raise ModelError(
            "FG-MODEL-005",
            f"{path} (architecture '{header.architecture}') cannot be converted: {error}",
            allowed="GGUF files of the architectures that transformers can read",
            fix="use the safetensors version of the model",
        ) from error
    if header.pre in _DIGITS_FIRST:
        _split_digits(tokenizer)
    return model, tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: Header
) -> None:
    length = getattr(model.config, "max_position_embeddings", None)
    if length and tokenizer.model_max_length > length:  # 1e30 where the file says nothing
        tokenizer.model_max_length = length
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def config(values: dict[str, Any]) -> None:
        for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
            values.pop(key, None)
        values.update({k: v for k, v in header.constants.items() if k in values})
        rope = values.get("rope_parameters") or {}
        if "rope_theta" in rope:  # where readers older than transformers 5 look for it
            values["rope_theta"] = rope["rope_theta"]

    def tokenizer_config(values: dict[str, Any]) -> None:
        for key in ("is_local", "local_files_only", "backend", "name_or_path"):
            values.pop(key, None)
        # the name that transformers 4 and 5, vLLM and llama.cpp's converter all know
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"

    _edit_json(folder / "config.json", config)
    _edit_json(folder / "tokenizer_config.json", tokenizer_config)


def reader(path: Path) -> Callable[[Path], None]:
    """Read a GGUF file now and return the function that writes it into a folder as safetensors.

    Raises:
        ModelError: FG-MODEL-005, damaged, cut off or of an unknown architecture.
    """
    header = read_header(path)
    model, tokenizer = _load(path, header)
    return lambda folder: _write(folder, model, tokenizer, header)


def convert(path: str | Path) -> Path:
    """Return the model folder for a GGUF file, converting it the first time.

    Args:
        path: The ``.gguf`` file.

    Returns:
        A folder in finegraft's cache that ``transformers`` loads as it is.

    Raises:
        ModelError: FG-MODEL-005, damaged, cut off or of an unknown architecture.
        StorageError: FG-DISK-001 to FG-DISK-003, the cache folder cannot take it.
    """
    path = Path(path).expanduser().resolve()
    facts = path.stat()
    stamp = {
        "conversion": CONVERSION,
        "source": str(path),
        "bytes": facts.st_size,
        "mtime_ns": facts.st_mtime_ns,
    }
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16]

    def make() -> Callable[[Path], None]:
        log.info("converting %s (%.0f MB) to safetensors, once", path, facts.st_size / 1e6)
        return reader(path)

    return cache.once(cache.models_dir() / f"{path.stem}-{key}", stamp, make)
