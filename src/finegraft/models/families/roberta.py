"""RoBERTa: the BERT shape, positions counted from after the padding id."""

from __future__ import annotations

from finegraft.models.families import _encoder as encoder

SPEC = encoder.bert_shape("Roberta", encoder.FlatRoberta, type_vocab_size=1)
