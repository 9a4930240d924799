"""Adapters that start from the training rows see some of them before the first step.

What: ``start_from_data`` does this for EVA and leaves every other adapter alone. How: the first
batches of the data, in their order, padded. Constraint: the random state is left alone and the rows
are always the same, so a resumed run starts at the ranks of the run that it goes on with.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from finegraft.adapters import lora

logger = logging.getLogger(__name__)

BATCHES = 16
_ROWS = 16  # of a batch


def start_from_data(model: nn.Module, batches: Callable[[], Iterable[dict[str, Any]]]) -> bool:
    """Start an EVA adapter that has not started; return whether there was one.

    Args:
        model: With its adapter.
        batches: Makes padded batches; called only where they are needed, the first ``BATCHES`` are
            read.

    Raises:
        AdapterError: FG-ADAPT-059, too few tokens in a batch for the rank.
    """
    if not lora.wants_data(model):
        return False
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        read = [
            {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            for batch in itertools.islice(batches(), BATCHES)
        ]
        lora.initialize_eva(model, read)
    logger.info("EVA: directions and ranks taken from %d batches", len(read))
    return True


def padded(rows: Iterable[Any], collate: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` in their order, as batches that ``collate`` makes."""
    rows = iter(rows)
    while taken := list(itertools.islice(rows, _ROWS)):
        yield collate(taken)
