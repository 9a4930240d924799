"""Rows of one set of weights that answer together.

What: a ``Lane`` takes requests in and moves all of them on by one token. How: ``Joining`` runs our
decoder on slots of one cache, so that a request joins and leaves between any two tokens;
``Together`` calls the model's own ``generate`` for those that wait together, with our choice of
tokens put in as a logits processor, for every model that the decoder does not know. Constraint:
an answer does not depend on the others (float32 in ``Together``, always in ``Joining``). Trade-off:
prompts are read in one go, some short ones or one long one between two tokens of the others, which
wait for that.

Shapes: b rows, t tokens of a prompt, v vocabulary, T columns of the caches; others as in
``inference.session``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from finegraft.inference.generate import left_padded
from finegraft.inference.session import Session
from finegraft.inference.weights import Weights
from finegraft.kernels.document_attention import Documents, document_attention
from finegraft.serving.engines._choose import Chooser
from finegraft.serving.engines._contract import Piece
from finegraft.serving.engines._text import Writer

_READ = 128  # tokens of prompts between two tokens of the others, or one longer prompt


@dataclass(eq=False)
class Row:
    """One request while it is answered.

    Attributes:
        give: Hands a piece to whoever asked; called in the thread of the lane.
        ends: Tokens that end the answer.
        cancelled: Set from outside.
        said: Tokens so far.
    """

    prompt: list[int]
    longest: int
    ends: frozenset[int]
    chooser: Chooser
    writer: Writer
    give: Callable[[Piece], None]
    cancelled: bool = False
    said: int = 0
    done: bool = False
    last: int = field(default=0, repr=False)

    def take(self, logits: torch.Tensor) -> int:
        """Choose the next token from logits [v] and hand its text on; sets ``done``."""
        token, share = self.chooser.choose(logits)
        self.said, self.last = self.said + 1, token
        if token in self.ends:
            self._end("stop")
            return token
        piece = self.writer.add(token, share)
        if piece is not None:
            self.give(piece)
        if self.writer.stopped:
            self._end("stop")
        elif self.said >= self.longest:
            self._end("length")
        return token

    def _end(self, reason: str) -> None:
        rest = self.writer.finish()
        if rest is not None:
            self.give(rest)
        self.done = True
        self.give(Piece(reason=reason, prompt_tokens=len(self.prompt), completion_tokens=self.said))


class Lane(Protocol):
    """Requests on one set of weights."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""

    def add(self, row: Row) -> None:
        """Queue a request."""

    def advance(self) -> None:
        """Move on by about one token."""


class Slots(Session):
    """Caches whose rows begin and end independently; each starts in column 0.

    Args:
        weights: Of the model.
        rows: How many.
    """

    def __init__(self, weights: Weights, rows: int):
        super().__init__(weights, [1] * rows)  # equal lengths: every row starts in column 0
        self.filled = [0] * rows

    @torch.no_grad()
    def begin(self, row: int, prompt: list[int]) -> torch.Tensor:
        """Read a prompt into a row; return logits [v] of its end."""
        length = len(prompt)
        self._make_room(length + 1)
        documents = Documents([length])

        def attend(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for cache, new in ((self.keys, k), (self.values, v)):
                cache[number, row, :, :length, : q.shape[-1]] = new.transpose(0, 1)
            window = self.weights.layers[number].window or None
            return document_attention(q, k, v, documents, self.weights.shape.scale, window)

        hidden = self._layers(torch.tensor(prompt), torch.arange(length), attend)  # [t, d]
        self.filled[row] = length
        return self._logits(hidden[-1:])[0]

    @torch.no_grad()
    def append(self, rows: list[int], ids: list[int]) -> torch.Tensor:
        """Append one token to each of some rows; return logits [b, v], overwritten by the next."""
        columns = torch.tensor([self.filled[row] for row in rows])
        for row in rows:
            self.filled[row] += 1
        self.width = int(columns.max())
        return self._run(torch.tensor(ids), torch.tensor(rows), columns, 1)


class Joining:
    """A lane on our decoder.

    Args:
        weights: With the adapter merged in.
        rows: Answers at a time.
        flush: Called when the pieces of a token were given; one waking of the clients' thread for
            all rows costs the steps less than one for each.
    """

    def __init__(self, weights: Weights, rows: int, flush: Callable[[], None] = lambda: None):
        self.weights, self.rows, self.flush = weights, rows, flush
        self.waiting: list[Row] = []
        self.active: dict[int, Row] = {}
        self.slots: Slots | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.active)

    def add(self, row: Row) -> None:
        """Queue a request."""
        self.waiting.append(row)

    def advance(self) -> None:
        """Let requests in, then append a token to every row."""
        self.waiting = [row for row in self.waiting if not row.cancelled]
        self._drop()
        read = 0
        while self.waiting and len(self.active) < self.rows:
            read += len(self.waiting[0].prompt)
            if read > _READ and read > len(self.waiting[0].prompt):
                break
            self._let_in(self.waiting.pop(0))
            self.flush()
        if self.active:
            slots = self.slots
            assert slots is not None
            places = sorted(self.active)
            logits = slots.append(places, [self.active[place].last for place in places])
            for place, row_logits in zip(places, logits, strict=True):
                self.active[place].take(row_logits)
            self._drop()
            self.flush()
        if not self.busy:
            self.slots = None  # memory of the longest answer is given back

    def _let_in(self, row: Row) -> None:
        if self.slots is None:
            self.slots = Slots(self.weights, self.rows)
        place = next(p for p in range(self.rows) if p not in self.active)
        row.take(self.slots.begin(place, row.prompt))
        self.active[place] = row
        self._drop()

    def _drop(self) -> None:
        self.active = {
            p: row for p, row in self.active.items() if not row.done and not row.cancelled
        }


class Together:
    """A lane on the model's own ``generate``.

    Args:
        model: In eval mode, with the right adapter switched on by ``switch``.
        switch: Called before each batch.
        rows: Answers at a time.
        pad: A token to fill up with.
        flush: Called when the pieces of a token were given.
    """

    def __init__(
        self,
        model: Any,
        switch: Callable[[], Any],
        rows: int,
        pad: int,
        flush: Callable[[], None] = lambda: None,
    ):
        self.model, self.switch, self.rows, self.pad = model, switch, rows, pad
        self.flush = flush
        self.waiting: list[Row] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting)

    def add(self, row: Row) -> None:
        """Queue a request."""
        self.waiting.append(row)

    def advance(self) -> None:
        """Answer those that wait now, to their ends."""
        batch = [row for row in self.waiting[: self.rows] if not row.cancelled]
        self.waiting = self.waiting[self.rows :]
        if batch:
            self.switch()
            self._generate(batch)

    @torch.no_grad()
    def _generate(self, batch: list[Row]) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        config = GenerationConfig(
            max_new_tokens=max(row.longest for row in batch),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=self.pad,
        )
        self.model.generate(
            **left_padded([row.prompt for row in batch], self.pad, self.model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choices(batch, self.pad)]),
            stopping_criteria=StoppingCriteriaList([_Finished(batch, self.flush)]),
        )


class _Choices:
    """Leaves one token to choose from in each row: the one that the request chose."""

    def __init__(self, batch: list[Row], pad: int):
        self.batch, self.pad = batch, pad

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, -torch.inf)
        for place, (row, logits) in enumerate(zip(self.batch, scores.float().cpu(), strict=True)):
            over = row.done or row.cancelled
            out[place, self.pad if over else row.take(logits)] = 0.0
        return out


class _Finished:
    """Which rows need no more tokens."""

    def __init__(self, batch: list[Row], flush: Callable[[], None]):
        self.batch, self.flush = batch, flush

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.flush()
        return torch.tensor([row.done or row.cancelled for row in self.batch], device=ids.device)
