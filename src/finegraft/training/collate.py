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

from finegraft.kernels.document_attention.layout import SHORT

IGNORED = -100
# A shared beginning of fewer tokens saves less than it costs.
_WORTH_SHARING = 8


@dataclass
class Collator:
    """Callable that makes a batch of rows with ``input_ids`` and ``labels``.

    Args:
        pad_token_id: Fills rows up; masked or a document of its own, so its value is never seen.
        flat: Lay documents behind one another, with ``seq_lengths`` [n + 1], the last of them the
            filling.
        multiple: Round t up to a multiple of this, in tokens. It keeps the number of different
            shapes small, for each of which oneDNN compiles and keeps kernels.
        share_prefix: In a flat batch, lay what all documents begin with down once, first, with its
            length as ``prefix_length``; gradients are those of computing it in every document.
    """

    pad_token_id: int
    flat: bool = False
    multiple: int = 8
    share_prefix: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self._flat(rows) if self.flat else self._rectangle(rows)

    def _flat(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        documents = [document for row in rows for document in _documents(row)]
        shared = _shared_tokens(documents) if self.share_prefix else 0
        parts = [(ids[shared:], labels[shared:]) for ids, labels in documents]
        if shared:
            parts.insert(0, (documents[0][0][:shared], [IGNORED] * shared))
        filling = -sum(len(ids) for ids, _ in parts) % (4 * self.multiple)
        parts.append(([self.pad_token_id] * filling, [IGNORED] * filling))
        starts = [0 if i == 0 else shared for i in range(len(parts))]
        batch = {
            "input_ids": torch.tensor([[token for ids, _ in parts for token in ids]]),  # [1, t]
            "labels": torch.tensor([[label for _, labels in parts for label in labels]]),
            "position_ids": torch.cat(
                [torch.arange(n, n + len(ids)) for n, (ids, _) in zip(starts, parts, strict=True)]
            )[None],
            "seq_lengths": torch.tensor([len(ids) for ids, _ in parts]),  # [n + 1]
        }
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        if shared:
            batch["prefix_length"] = torch.tensor(shared)
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


def _documents(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the documents of a row, which are several when it is packed."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    lengths = list(row.get("seq_lengths") or [len(ids)])
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(ids[e - n : e], labels[e - n : e]) for e, n in zip(ends, lengths, strict=True)]


def _shared_tokens(documents: list[tuple[list[int], list[int]]]) -> int:
    """How many first tokens may be computed once for all documents.

    They are equal everywhere, carry no label, and do not predict one: what the last of them
    predicts may differ from document to document.
    """
    if len(documents) < 2 or max(len(ids) for ids, _ in documents) > SHORT:
        return 0
    first, last = (choose(ids for ids, _ in documents) for choose in (min, max))
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    common = min(len(first), len(last)) if same is None else same
    for ids, labels in documents:
        labelled = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
        common = min(common, labelled - 1, len(ids) - 1)
    return common if common >= _WORTH_SHARING else 0
