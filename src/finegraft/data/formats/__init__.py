"""The layouts of rows that finegraft reads, one module each; the file name is the format's name."""

from __future__ import annotations

from finegraft.core.registry import Registry
from finegraft.data.conversation import DatasetFormat

FORMATS: Registry[DatasetFormat] = Registry("finegraft.data.formats", "FORMAT", "format")
