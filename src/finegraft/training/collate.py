"""Rows to tensors.

What: flat batches (documents behind one another, no padding) for models that take them, else
right-padded batches with a mask, or packed ones with restarting positions. How: a row may carry
``seq_lengths``, the lengths of the documents packed into it; without a flat batch no attention mask
is made then, because transformers builds the block-diagonal mask only without one.
Constraint: the first token of every document carries no label: nothing before it predicts it.

Shapes: b rows, t tokens of the longest row or of the flat batch, n documents.
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
        flat: Lay documents behind one another, with ``seq_lengths`` [n + 1], the last of them the
            filling.
        multiple: Round t up to a multiple of this, in tokens. It keeps the number of different
            shapes small, for each of which oneDNN compiles and keeps kernels.
    """

    pad_token_id: int
    flat: bool = False
    multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self._flat(rows) if self.flat else self._rectangle(rows)

    def _flat(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in row["labels"]]
        lengths = [n for row in rows for n in row.get("seq_lengths") or [len(row["input_ids"])]]
        filling = -len(ids) % (4 * self.multiple)
        documents = [*lengths, filling]
        batch = {
            "input_ids": torch.tensor([ids + [self.pad_token_id] * filling]),  # [1, t]
            "labels": torch.tensor([labels + [IGNORED] * filling]),
            "position_ids": torch.cat([torch.arange(n) for n in documents])[None],
            "seq_lengths": torch.tensor(documents),  # [n + 1]
        }
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch

    def _rectangle(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // self.multiple) * self.multiple
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
