"""BERT and what has its shape under ``model_type: bert``: MiniLM, BGE, E5, GTE."""

from __future__ import annotations

from finegraft.models.families import _encoder as encoder

SPEC = encoder.bert_shape("Bert", encoder.FlatBert, type_vocab_size=2)
