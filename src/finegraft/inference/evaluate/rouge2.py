"""ROUGE-2: F1 of the pairs of neighbouring words that answer and reference share."""

from __future__ import annotations

from finegraft.inference.evaluate._rouge import make

METRIC = make("rouge2", "F1 of shared pairs of neighbouring words")
