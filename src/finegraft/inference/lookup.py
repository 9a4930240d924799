"""Guess the next tokens from the text itself: prompt-lookup speculation.

What: the longest end of the text that occurred before, and what followed it then. How: one
dictionary per length of an end, kept up to date as tokens come, so that a guess costs the same at
any length of text. Constraint: a guess never changes an answer; the model checks it, and only what
it would have said itself is kept. Trade-off: checking costs time (eight tokens take half again as
long as one on a CPU), so guesses get shorter where they miss.

Source: prompt lookup decoding after speculative decoding, https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # ends that are looked up, in tokens; one token alone misses too often


class Lookup:
    """Text of one row, with the places of its short runs of tokens.

    Args:
        tokens: The prompt.
        most: Longest guess, in tokens.
    """

    def __init__(self, tokens: Sequence[int], most: int):
        self.tokens: list[int] = []
        self.most = most
        self.length = most
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]
        self._before: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what was said; remember where each run ends, and where it ended before that."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                run = tuple(self.tokens[end - size :])
                if run in self._after[size]:
                    self._before[size][run] = self._after[size][run]
                self._after[size][run] = end

    def guess(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the longest known end of the text."""
        end = len(self.tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            place = self._before[size].get(tuple(self.tokens[end - size :]))
            if place is not None:
                return self.tokens[place : place + min(most, self.length)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Guess longer after a guess that was right to its end, shorter after one that was not."""
        if guessed:
            self.length = self.most if right == guessed else max(2, min(self.most, 2 * right))
