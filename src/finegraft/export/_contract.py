"""What an export format exports as ``FORMAT``.

What: facts and three functions. How: ``problems`` says what stands in the way without writing,
``write`` writes all of it or nothing, ``verify`` reads the files back and compares. Constraint: a
source is a model folder or a pair (model, tokenizer); each format takes both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """One file or folder that an export made.

    Attributes:
        file: Where it is.
        type: The variant, ``q8_0`` say.
        bytes: Its size.
        beside: Files that belong to it, a Modelfile say.
    """

    file: Path
    type: str
    bytes: int
    beside: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Check:
    """One comparison of an export with what it was made from.

    Attributes:
        name: What was compared.
        value: What was measured.
        tolerance: The largest ``value`` that passes.
        ok: Whether it passed.
        cause: What a failure means, or None.
    """

    name: str
    value: float
    tolerance: float
    ok: bool
    cause: str | None = None


@dataclass(frozen=True)
class Format:
    """One way of writing a model.

    Attributes:
        summary: One line for help texts and docs.
        variants: Names that may follow the format's own, ``gguf:q8_0`` say, each with one line.
        options: Keywords of ``write`` that a user may set, each with one line.
        problems: ``problems(source, path, types, **options)`` returns the errors that ``write``
            would raise, an empty list where nothing stands in the way.
        write: ``write(source, path, types, **options)`` returns what it wrote.
        verify: ``verify(source, file, **options)`` reads ``file`` back and compares.
    """

    summary: str
    variants: Mapping[str, str]
    options: Mapping[str, str]
    problems: Callable[..., list[Exception]]
    write: Callable[..., list[Written]]
    verify: Callable[..., list[Check]]
