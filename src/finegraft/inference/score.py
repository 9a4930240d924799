"""How good a model is on rows that it has not seen.

What: the held-out loss and the share of exact answers. How: rows sorted by length, padded on the
right; logits are picked at labelled positions before anything is computed in float32, so a long
prompt costs no vocabulary-wide float32 row. Constraint: it uses no loss of the model's own, so it
can judge one. Trade-off: the model still makes a logit for every position of a batch.

Shapes: b rows of a batch, t tokens, v vocabulary, n labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finegraft.core.errors import DataError
from finegraft.inference.modes import answering

IGNORED = -100


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers by falling length, ``size`` at a time: least padding, most memory first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def heldout_loss(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int = 0,
    batch_size: int = 8,
) -> float:
    """Mean negative log-likelihood of the labelled tokens, each token counting the same.

    Args:
        model: A causal language model; its training flags are restored afterwards.
        input_ids: One list of token ids a row.
        labels: The same shape; -100 where nothing is to be scored. Label i is predicted at i - 1.
        pad_id: Any id of the vocabulary; padding is masked, so its value does not matter.
        batch_size: Rows at a time.

    Returns:
        Nats a token.

    Raises:
        DataError: FG-SCORE-001, no token carries a label.
    """
    device = model.device
    total, tokens = 0.0, 0
    with answering(model), torch.no_grad():
        for batch in _batches([len(row) for row in input_ids], batch_size):
            width = len(input_ids[batch[0]])
            rows = torch.full((len(batch), width), pad_id)
            target = torch.full((len(batch), width), IGNORED)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for line, i in enumerate(batch):
                length = len(input_ids[i])
                rows[line, :length] = torch.tensor(input_ids[i])
                target[line, :length] = torch.tensor(labels[i])
                mask[line, :length] = 1
            logits = model(
                input_ids=rows.to(device), attention_mask=mask.to(device), use_cache=False
            ).logits  # [b, t, v]
            wanted = target[:, 1:].to(logits.device)
            scored = wanted != IGNORED
            chosen = logits[:, :-1][scored].float().log_softmax(-1)  # [n, v]
            total -= chosen.gather(1, wanted[scored][:, None]).double().sum().item()
            tokens += int(scored.sum())
    if tokens == 0:
        raise DataError(
            "FG-SCORE-001",
            f"none of the {len(input_ids)} held-out rows has a token to score",
            allowed="rows with an answer of at least one token",
            fix="pass rows with answers, or a larger max_length so that answers are not cut off",
        )
    return total / tokens


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference, white space around them aside.

    Args:
        predictions: What the model said.
        references: What it should have said, in the same order.

    Returns:
        A number from 0 to 1.

    Raises:
        DataError: FG-SCORE-002, nothing to compare or different counts.
    """
    if not references or len(predictions) != len(references):
        raise DataError(
            "FG-SCORE-002",
            f"{len(predictions)} predictions for {len(references)} references",
            allowed="as many predictions as references, at least one",
            fix="pass one prediction for each reference",
        )
    pairs = zip(predictions, references, strict=True)
    return sum(got.strip() == want.strip() for got, want in pairs) / len(references)
