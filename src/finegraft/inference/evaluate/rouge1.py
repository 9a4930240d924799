"""ROUGE-1: F1 of the single words that answer and reference share."""

from __future__ import annotations

from finegraft.inference.evaluate._rouge import make

METRIC = make("rouge1", "F1 of shared single words")
