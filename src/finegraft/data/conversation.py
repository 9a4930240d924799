"""The one shape that every dataset format becomes.

What: a conversation is a list of messages, ``{"role": ..., "content": ...}``; raw text is one
message of the role ``text``. How: a format is a frozen record of four functions and an example,
found by file name in ``data/formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Row = Mapping[str, Any]

TEXT_ROLE = "text"


@dataclass(frozen=True)
class DatasetFormat:
    """How one layout of rows is recognised and read.

    Attributes:
        columns: The columns it needs, as messages name them.
        matches: Whether a row with these column names is of this format.
        to_messages: The row as a conversation; raises ``DataError`` for null or empty fields.
        example: A row of this format.
        expected: What ``to_messages(example)`` gives.
    """

    columns: tuple[str, ...]
    matches: Callable[[frozenset[str], Row], bool]
    to_messages: Callable[[Row], list[Message]]
    example: Row
    expected: list[Message]
