"""A batch as a flat row of documents, whatever it came as.

What: rows with a mask, packed rows with restarting positions, or a batch that is flat already
become ids [1, m], positions [1, m] and ``Documents``; results go back to where they belong.
Constraint: only calls that want states and nothing else (no cache, no hidden states of every
layer) are taken; any other call returns None, and the stock forward runs. Trade-off: m is filled up
to a multiple of 32 with a document of its own, because oneDNN compiles kernels for each new shape.

Shapes: b rows, t tokens of a row, m tokens of the flat batch, d hidden.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from finegraft.kernels.document_attention import Documents

MULTIPLE = 32
# Requests that only the stock forward answers.
_STOCK_ONLY = ("past_key_values", "use_cache", "output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class FlatBatch:
    """Tokens without padding.

    Attributes:
        ids: [1, m] or None.
        embedded: [1, m, d] or None.
        positions: [1, m].
        documents: Their lengths; the last may be filling.
        places: [tokens] in b * t of the tokens before the filling; None: the batch came flat.
        shape: (b, t).
    """

    ids: torch.Tensor | None
    embedded: torch.Tensor | None
    positions: torch.Tensor
    documents: Documents
    places: torch.Tensor | None
    shape: tuple[int, int]

    def rows(self, wanted: torch.Tensor) -> torch.Tensor:
        """Where the places ``wanted`` [n] in b * t lie in the flat batch."""
        if self.places is None:
            return wanted
        where = wanted.new_zeros(self.shape[0] * self.shape[1])
        where[self.places] = torch.arange(self.places.numel(), device=wanted.device)
        return where[wanted]

    def restored(self, states: torch.Tensor) -> torch.Tensor:
        """[m, d] to [b, t, d]; zeros where a mask hid the token."""
        if self.places is None:
            return states[None]
        full = states.new_zeros(self.shape[0] * self.shape[1], states.shape[-1])
        return full.index_copy(0, self.places, states[: self.places.numel()]).view(*self.shape, -1)


def runs_on(device: torch.device) -> bool:
    """Whether documents attend by themselves there: on CPUs, and on CUDA with Triton."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu"


def take(config: Any, training: bool, ids: torch.Tensor | None, call: dict) -> FlatBatch | None:
    """Read a decoder's call; None when the stock forward must run.

    Args:
        config: The text configuration, for its defaults.
        training: Whether the model is in training mode, where no cache is kept.
        ids: [b, t] or None.
        call: The keyword arguments of the call; it is not changed.
    """
    if any(
        call.get(name, getattr(config, name, None) if "output" in name else None)
        for name in _STOCK_ONLY
    ):
        return None
    if call.get("use_cache") is None and not training and getattr(config, "use_cache", False):
        return None
    embedded = call.get("inputs_embeds")
    given = ids if ids is not None else embedded
    if given is None or not runs_on(given.device):
        return None
    if "seq_lengths" in call:
        documents = Documents(call["seq_lengths"].tolist(), "prefix_length" in call)
        positions, shape = call["position_ids"], (1, given.shape[1])
        return FlatBatch(ids, embedded, positions, documents, None, shape)
    return _flattened(ids, embedded, call)


def _flattened(
    ids: torch.Tensor | None, embedded: torch.Tensor | None, call: dict
) -> FlatBatch | None:
    given = ids if ids is not None else embedded
    b, t = given.shape[:2]
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return None
    device = given.device
    starts = (
        torch.arange(t, device=device)[None].expand(b, t)
        if positions is None
        else positions.expand(b, t)
    )
    if mask is None:
        places = torch.arange(b * t, device=device)
        # Packed rows: a document begins where positions do not go on, as transformers reads them.
        begins = torch.ones(b, t, dtype=torch.bool, device=device)
        begins[:, 1:] = starts.diff(dim=1) != 1
        starting = begins.reshape(-1).nonzero().squeeze(-1).tolist()
        lengths = [end - start for start, end in itertools.pairwise([*starting, b * t])]
    else:
        places = mask.reshape(-1).nonzero().squeeze(-1)
        lengths = mask.bool().sum(1).tolist()
    filling = -places.numel() % MULTIPLE
    positions = torch.cat([starts.reshape(-1)[places], torch.arange(filling, device=device)])[None]
    if ids is not None:
        ids = F.pad(ids.reshape(-1)[places], (0, filling))[None]
    if embedded is not None:
        rows = embedded.reshape(b * t, -1).index_select(0, places)
        embedded = F.pad(rows, (0, 0, 0, filling))[None]
    return FlatBatch(ids, embedded, positions, Documents([*lengths, filling]), places, (b, t))
