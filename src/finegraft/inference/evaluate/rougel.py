"""ROUGE-L: F1 of the words that answer and reference share in the same order."""

from __future__ import annotations

from finegraft.inference.evaluate._rouge import make

METRIC = make("rougeL", "F1 of shared words in the same order")
