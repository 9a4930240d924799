"""Formats that a model or an adapter is written in, one module or package each, found by name.

What: ``FORMATS`` lists the files of this folder that do not begin with an underscore and imports
one when it is asked for. Constraint: what a format cannot hold is refused before anything is
written; a file appears under its final name only when it is whole.
"""

from __future__ import annotations

from finegraft.core.registry import Registry
from finegraft.export._contract import Check, Format, Written

__all__ = ["FORMATS", "Check", "Format", "Written"]

FORMATS: Registry[Format] = Registry("finegraft.export", "FORMAT", "export format")
