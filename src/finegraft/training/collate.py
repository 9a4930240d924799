"""Rows to tensors.

What: right-padded batches with a mask, and packed batches with restarting positions. How: a row
may carry ``seq_lengths``, the lengths of the documents packed into it; then no attention mask is
made, because transformers builds the block-diagonal mask only without one.
Constraint: the first token of every document carries no label: nothing before it predicts it.

Shapes: b rows, t tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass
class Collator:
    """Callable that makes a batch of rows with ``input_ids`` and ``labels``.

    Args:
        pad_token_id: Fills rows up; masked or a document of its own, so its value is never seen.
        pad_to_multiple_of: Round t up to a multiple of this, in tokens. Eight keeps the number of
            different shapes small, for each of which oneDNN compiles and keeps kernels.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id),  # [b, t]
            "labels": torch.full((len(rows), width), IGNORED),
        }
        packed = any(row.get("seq_lengths") for row in rows)
        batch["position_ids" if packed else "attention_mask"] = torch.zeros(
            (len(rows), width), dtype=torch.long
        )
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            lengths = list(row.get("seq_lengths") or [size])
            batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
            batch["labels"][i, :size] = torch.tensor(row["labels"])
            if packed:
                documents = [*lengths, width - size]  # the padding is a document of its own
                batch["position_ids"][i] = torch.cat([torch.arange(n) for n in documents])
            else:
                batch["attention_mask"][i, :size] = 1
            starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            batch["labels"][i, starts] = IGNORED
        return batch
