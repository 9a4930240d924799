"""How good a model is on rows that it has not seen.

What: the held-out loss, of each row or of all, and the share of exact answers. How: rows sorted by
length, padded on the right; logits are picked at labelled positions before anything is computed in
float32, so a long prompt costs no vocabulary-wide float32 row. Constraint: it uses no loss of the
model's own, so it can judge one. Trade-off: the model still makes a logit for every position of a
batch.

Shapes: b rows of a batch, t tokens, v vocabulary, n labelled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from finegraft.core.errors import DataError
from finegraft.inference.modes import answering

IGNORED = -100


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers by falling length, ``size`` at a time: least padding, most memory first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def row_losses(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int = 0,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood of each row's labelled tokens, and how many there are.

    Args:
        model: A causal language model; its training flags are restored afterwards.
        input_ids: One list of token ids a row.
        labels: The same shape; -100 where nothing is to be scored. Label i is predicted at i - 1.
        pad_id: Any id of the vocabulary; padding is masked, so its value does not matter.
        batch_size: Rows at a time.
        on_progress: Called with how many rows are done, and of how many.

    Returns:
        Nats and tokens, in the order of the rows.
    """
    device, done = model.device, 0
    sums, tokens = [0.0] * len(input_ids), [0] * len(input_ids)
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
            nats = -chosen.gather(1, wanted[scored][:, None])[:, 0].double()  # [n]
            for i, own in zip(batch, nats.split(scored.sum(1).tolist()), strict=True):
                sums[i], tokens[i] = own.sum().item(), len(own)
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(input_ids))
    return sums, tokens


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
        model: As for ``row_losses``.
        input_ids: As for ``row_losses``.
        labels: As for ``row_losses``.
        pad_id: As for ``row_losses``.
        batch_size: Rows at a time.

    Returns:
        Nats a token.

    Raises:
        DataError: FG-SCORE-001, no token carries a label.
    """
    sums, tokens = row_losses(model, input_ids, labels, pad_id=pad_id, batch_size=batch_size)
    if not any(tokens):
        raise DataError(
            "FG-SCORE-001",
            f"none of the {len(input_ids)} held-out rows has a token to score",
            allowed="rows with an answer of at least one token",
            fix="pass rows with answers, or a larger max_length so that answers are not cut off",
        )
    return sum(sums) / sum(tokens)


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
