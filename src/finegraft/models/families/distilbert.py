"""DistilBERT: the BERT shape under names of its own, without token types and pooler."""

from __future__ import annotations

import functools

from finegraft.models.families import _encoder as encoder

_TINY = {
    "dim": 32,
    "hidden_dim": 56,
    "n_layers": 2,
    "n_heads": 4,
}

SPEC = encoder.family(
    "DistilBert",
    {
        "DistilBertModel": encoder.FlatDistilBert,
        "DistilBertSelfAttention": encoder.DistilBertRowAttention,
        "TransformerBlock": encoder.FusedBlock,
        "FFN": encoder.FusedFfn,
    },
    functools.partial(encoder.tiny, "DistilBert", _TINY),
)
