"""The next token of one row, chosen as its request wants.

What: ``Chooser`` holds a request's options, its random stream and what it said. How: penalties and
biases, then temperature, top-k, top-p and min-p in the order of transformers' ``generate``; each
request has a generator of its own. Constraint: a seed gives the same answer whatever other rows
there are; greedy without options is one argmax. Trade-off: rows are handled one by one; for a
vocabulary of 49,152 greedy takes 5 us (numpy's argmax, torch's takes 70), sampling 0.1 ms (one
number looked up in the running sum of shares, ``torch.multinomial`` takes 0.9), top_p 3 ms.

Shapes: v vocabulary.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from finegraft.serving.engines._contract import Options, Token

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Chooser:
    """Chooses tokens for one request.

    Args:
        options: Of the request.
        tokenizer: For the texts of reported tokens.
        vocabulary: Numbers in a row of logits.
    """

    def __init__(self, options: Options, tokenizer: Any, vocabulary: int):
        self.options, self.tokenizer = options, tokenizer
        self.said: dict[int, int] = {}
        self._random = torch.Generator()
        if options.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(options.seed % 2**63)
        known = {i: bias for i, bias in options.logit_bias.items() if i < vocabulary}
        self._bias = (torch.tensor(list(known)), torch.tensor(list(known.values())))

    @torch.no_grad()
    def choose(self, logits: torch.Tensor) -> tuple[int, Token | None]:
        """Return a token for logits [v], and its share where that is wanted."""
        wanted = self.options
        scores = self._adjusted(logits)
        greedy = wanted.temperature == 0
        token = int(scores.float().numpy().argmax()) if greedy else self._sample(scores)
        self.said[token] = self.said.get(token, 0) + 1
        return token, self._share(logits, token) if wanted.top_logprobs is not None else None

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with biases and penalties; the same tensor where there are none."""
        places, biases = self._bias
        penalties = self.options.frequency_penalty, self.options.presence_penalty
        if not len(places) and not any(penalties):
            return logits
        scores = logits.float().clone()
        if len(places):
            scores[places] += biases
        if any(penalties) and self.said:
            tokens, counts = torch.tensor(list(self.said.items())).unbind(1)
            scores[tokens] -= penalties[0] * counts + penalties[1]
        return scores

    def _sample(self, scores: torch.Tensor) -> int:
        wanted = self.options
        scores = scores.float() / max(wanted.temperature, 1e-5)
        if 0 < wanted.top_k < scores.numel():
            scores = scores.masked_fill(scores < scores.topk(wanted.top_k).values[-1], -torch.inf)
        shares = torch.softmax(scores, -1)
        if wanted.top_p < 1:
            ordered, order = shares.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            shares[order[before >= wanted.top_p]] = 0.0  # the likeliest has nothing before it
        if wanted.min_p > 0:
            shares[shares < wanted.min_p * shares.max()] = 0.0
        upto = shares.cumsum(-1, dtype=torch.float64)
        at = torch.rand((), generator=self._random, dtype=torch.float64) * upto[-1]
        # the first whose sum is beyond it, so that a share of nothing is never taken
        return int(torch.searchsorted(upto, at, right=True).clamp_(max=int(upto.argmax())))

    def _share(self, logits: torch.Tensor, token: int) -> Token:
        shares = torch.log_softmax(logits.float(), -1)
        top = shares.topk(min(self.options.top_logprobs or 0, shares.numel()))
        others = tuple(self._token(int(i), float(value)) for value, i in zip(*top, strict=True))
        return self._token(token, float(shares[token]), others)

    def _token(self, token: int, logprob: float, top: tuple[Token, ...] = ()) -> Token:
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return Token(text, _bytes(self.tokenizer, token, text), logprob, top)


def _bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """A token's own bytes, also where they are a part of a character only."""
    if "\ufffd" not in text:
        return text.encode("utf-8", "replace")
    piece = str(tokenizer.convert_ids_to_tokens(token))
    alone = _BYTE_PIECE.fullmatch(piece)
    if alone:  # as SentencePiece writes them
        return bytes([int(alone[1], 16)])
    known = _letters()
    if all(letter in known for letter in piece):
        return bytes(known[letter] for letter in piece)
    return text.encode("utf-8", "replace")


@functools.cache
def _letters() -> dict[str, int]:
    """Bytes by the letters that byte-level tokenizers write for them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
