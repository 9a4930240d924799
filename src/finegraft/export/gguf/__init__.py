"""GGUF, the files that llama.cpp, Ollama, LM Studio and GPT4All run.

What: ``write`` for models, ``write_lora`` for adapters, ``verify`` reads a model's file back. How:
pure Python on the ``gguf`` package; ``libgguf`` for K-quants. Constraint: a file holds what
llama.cpp's own converter and quantizer would have written, tensor by tensor; what they cannot
express is an error.
"""

from __future__ import annotations

from finegraft.export._contract import Format, Written
from finegraft.export.gguf.check import verify, verify_lora
from finegraft.export.gguf.lora import write_lora
from finegraft.export.gguf.types import FILE_TYPES
from finegraft.export.gguf.writer import problems, write

__all__ = [
    "FILE_TYPES",
    "FORMAT",
    "Written",
    "problems",
    "verify",
    "verify_lora",
    "write",
    "write_lora",
]

FORMAT = Format(
    summary="GGUF for llama.cpp, Ollama, LM Studio, GPT4All",
    variants={name: kind.summary for name, kind in FILE_TYPES.items()},
    options={
        "pre_tokenizer": "llama.cpp's name for how the tokenizer splits; found out by default",
        "pooling": "for encoders: mean, cls or last",
        "threads": "for quantizing; all that the process may use by default",
        "name": "of the model, in the file and in file names",
    },
    problems=problems,
    write=write,
    verify=verify,
)
