"""An export as the library reads it that will run it: transformers, or peft beside the base.

What: a ``Reader`` says what an engine makes of a prompt and which probabilities it gives tokens.
How: the stock classes of transformers, nothing swapped, and the export's own tokenizer. Constraint:
texts and ids come from the export alone. Trade-off: one row at a time, so that no padding can hide
or make a difference.

Shapes: n compared tokens of a row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from finegraft import opening
from finegraft.data import render
from finegraft.export._verify.prompts import Row
from finegraft.models import load, swap
from finegraft.models.locate import locate


class Reader(Protocol):
    """One engine with an export in it."""

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """The text that the engine makes of a conversation without its answer, and its ids."""

    def text(self, text: str) -> list[int]:
        """The ids that the engine makes of plain text."""

    def score(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Log-probabilities [n, v] of each row; NaN where the engine does not tell them."""

    def close(self) -> None:
        """Let go of what is open."""


class FolderReader:
    """transformers, and peft for an adapter.

    Args:
        folder: Of the export.
        task: ``causal`` or ``sequence-classification``.
        dtype: To compute in.
        base: Folder of the base, for an adapter.
    """

    def __init__(self, folder: Path, task: str, dtype: torch.dtype, base: Path | None = None):
        self.tokenizer: Any = load.load_tokenizer(folder)
        how: dict[str, Any] = {"task": task, "dtype": dtype}
        if base is not None and task != "causal":
            how |= opening.saved_labels(locate(folder))
        self.model: Any = load.load_model(base or folder, **how)
        if base is not None:
            if len(self.tokenizer) > self.model.get_input_embeddings().weight.shape[0]:
                self.model.resize_token_embeddings(len(self.tokenizer))
            self.model = opening.open_with_peft(folder, self.model)
        self.task = task

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """See ``Reader``."""
        asked = row.asked
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return text, list(ids)

    def text(self, text: str) -> list[int]:
        """See ``Reader``."""
        return list(self.tokenizer(text)["input_ids"])

    def score(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See ``Reader``."""
        return score(self.model, rows)

    def close(self) -> None:
        """See ``Reader``."""
        self.model = None


def score(model: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Log-probabilities [n, v] that a model in memory gives the compared tokens of each row.

    For a classifier [1, labels]. A row with tokens that the model has no row for gives NaN.
    """
    core = swap.core(model)
    size = core.get_input_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    found = []
    try:
        with torch.no_grad():
            for row in rows:
                if max(row.ids) >= size:
                    found.append(torch.full((max(1, len(row.scored)), size), torch.nan))
                    continue
                ids = torch.tensor([row.ids], device=core.device)
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
                if row.scored:
                    out = out[[place - 1 for place in row.scored]]  # [n, v]
                values = out.float()
                if out.dim() == 1:
                    values = values[None]
                found.append((values.log_softmax(-1) if values.shape[-1] > 1 else values).cpu())
    finally:
        model.train(training)
    return found


class Expected:
    """What the trained model's own tokenizer makes of the same."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """The text and the ids that training and answering start from."""
        asked = row.asked
        text = render.render_prompt_text(asked, self.tokenizer)
        return text, render.render_prompt(asked, self.tokenizer)

    def text(self, text: str) -> list[int]:
        """The ids of plain text, with what the tokenizer puts around it."""
        return list(self.tokenizer(text)["input_ids"])


PLAIN_TEXTS = ("Hello, world!", "naïve café, 東京 😀", "  two  spaces\n\ttab", "x" * 3)
