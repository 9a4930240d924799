"""Token ids become text as they come, up to a stop sequence.

What: ``Writer`` takes one token after another and gives the text that is final. How: only the last
few tokens are decoded again, with some before them, because what a token looks like depends on its
neighbours; bytes of an unfinished character, and text that may be the beginning of a stop sequence,
are held back with their log-probabilities. Constraint: joined, the pieces are what decoding all
tokens at once gives, up to the stop. Trade-off: a held text comes one token later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finegraft.serving.engines._contract import Piece, Token

_BEFORE = 6  # tokens decoded again before new ones


class Writer:
    """Text of one answer.

    Args:
        tokenizer: Special tokens are left out.
        stops: Sequences that end the answer and do not belong to it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False
        self._known = 0  # tokens whose text was read off
        self._held, self._shares = "", []  # type: str, list[Token]

    def add(self, token: int, share: Token | None = None) -> Piece | None:
        """Take a token; return what became final, or None. ``stopped`` tells a stop sequence."""
        self.ids.append(token)
        if share is not None:
            self._shares.append(share)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return None
        self._known = len(self.ids)
        self._held += text
        ends = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)]
            return self._release(len(self._held))
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        return self._release(len(self._held) - keep)

    def finish(self) -> Piece | None:
        """Everything that was held back."""
        if not self.stopped:
            self._held += self._new_text()
        return self._release(len(self._held))

    def _new_text(self) -> str:
        start = max(0, self._known - _BEFORE)
        before = self._decode(self.ids[start : self._known])
        return self._decode(self.ids[start:])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _release(self, count: int) -> Piece | None:
        text, self._held = self._held[:count], self._held[count:]
        shares: list[Token] = []
        if not self._held:  # shares go with the text that they belong to
            shares, self._shares = self._shares, []
        return Piece(text=text, tokens=tuple(shares)) if text or shares else None


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
