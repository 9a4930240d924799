"""The quickstart's data: plain English sentences and how Yoda would say them.

What: sentence pairs made by a small grammar. How: six patterns, each with one object-first order
and one interjection, filled with words whose classes keep them plausible (teachers buy lamps,
lamps are heavy, nobody eats a bridge). Constraint: the answer follows from the sentence by a rule,
so exact match on held-out sentences measures learning; every word stands in many rows, so none is
new when held out. The rows depend on ``count`` and ``seed`` alone, on any version of Python.
Trade-off: the English is simple.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from finegraft.core.errors import ConfigError

Pair = tuple[str, str]

_PEOPLE = ["farmer", "sailor", "teacher", "soldier", "baker", "doctor"]
_ANIMALS = ["dog", "horse", "fox", "bear", "cat"]
_THINGS = ["book", "lamp", "box", "coat", "basket", "letter", "rope"]
_PLACES = ["river", "bridge", "hill", "forest", "garden", "castle", "road"]
_OF_BEINGS = ["young", "brave", "clever", "gentle", "tired", "hungry", "happy", "quiet"]
_OF_THINGS = ["heavy", "small", "red", "blue", "old", "broken", "golden", "wet"]
_OF_PLACES = ["dark", "cold", "wide", "distant", "peaceful", "narrow", "lonely"]
# Base form and past, for a person and a thing.
_PAST = {
    "carry": "carried",
    "find": "found",
    "lift": "lifted",
    "drop": "dropped",
    "sell": "sold",
    "buy": "bought",
    "bring": "brought",
    "guard": "guarded",
    "lose": "lost",
    "hide": "hid",
}
_MOVES = ["walked", "ran", "hurried", "wandered", "marched"]
_STAYS = ["slept", "waited", "rested", "stood", "sat"]
_WHERE_TO = ("toward", "past", "around")
_WHERE = ("near", "beside", "by")


class _Dice:
    """Choices from ``random()`` alone, whose sequence Python keeps between versions.

    Words are dealt like cards, so that each of a list comes up equally often.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._decks: dict[tuple[str, ...], list[str]] = {}

    def below(self, number: int) -> int:
        return int(self._random.random() * number)

    def choose(self, items: Sequence[str]) -> str:
        deck = self._decks.setdefault(tuple(items), [])
        if not deck:
            deck.extend(sorted(items, key=lambda _: self._random.random()))
        return deck.pop()

    def being(self) -> str:
        return f"the {self.choose(_OF_BEINGS)} {self.choose(_PEOPLE + _ANIMALS)}"

    def person(self) -> str:
        return f"the {self.choose(_OF_BEINGS)} {self.choose(_PEOPLE)}"

    def thing(self) -> str:
        return f"the {self.choose(_OF_THINGS)} {self.choose(_THINGS)}"

    def place(self) -> str:
        return f"the {self.choose(_OF_PLACES)} {self.choose(_PLACES)}"

    def deed(self) -> tuple[str, str]:
        verb = self.choose(list(_PAST))
        return verb, _PAST[verb]


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def _whereabouts(dice: _Dice) -> Pair:
    verbs, words = ((_MOVES, _WHERE_TO), (_STAYS, _WHERE))[dice.below(2)]
    who, verb = dice.being(), dice.choose(verbs)
    where = f"{dice.choose(words)} {dice.place()}"
    return f"{_cap(who)} {verb} {where}.", f"{_cap(where)}, {who} {verb}. Yes, hrrrm."


def _deed(dice: _Dice) -> Pair:
    who, what, (_, past) = dice.person(), dice.thing(), dice.deed()
    return f"{_cap(who)} {past} {what}.", f"{_cap(what)}, {who} {past}. Yes, hrrrm."


def _order(dice: _Dice) -> Pair:
    modal, what, (verb, _) = dice.choose(("must", "will")), dice.thing(), dice.deed()
    return f"You {modal} {verb} {what}.", f"{_cap(verb)} {what}, you {modal}. Herh herh herh."


def _quality(dice: _Dice) -> Pair:
    if dice.below(2):
        what, quality = f"the {dice.choose(_PEOPLE + _ANIMALS)}", dice.choose(_OF_BEINGS)
        what += f" {dice.choose(_WHERE)} {dice.place()}"
    else:
        what, quality = f"the {dice.choose(_THINGS)}", dice.choose(_OF_THINGS)
        what += f" {dice.choose(_WHERE)} {dice.place()}"
    return f"{_cap(what)} is {quality}.", f"{_cap(quality)}, {what} is. Yes, hrrrm."


def _denial(dice: _Dice) -> Pair:
    who, what, (verb, _) = dice.person(), dice.thing(), dice.deed()
    return f"{_cap(who)} did not {verb} {what}.", f"{_cap(what)}, {who} did not {verb}. No, hmm."


def _question(dice: _Dice) -> Pair:
    who, what, (verb, _) = dice.person(), dice.thing(), dice.deed()
    return f"Did {who} {verb} {what}?", f"{_cap(what)}, did {who} {verb}? Hmm?"


_PATTERNS: tuple[Callable[[_Dice], Pair], ...] = (
    _whereabouts,
    _deed,
    _order,
    _quality,
    _denial,
    _question,
)
# "You must ..." has the fewest sentences: 2 x 10 x 56.
_MOST_ROWS = 6 * 800


def rows(count: int = 720, seed: int = 3407) -> list[dict[str, str]]:
    """Return sentence pairs, no sentence twice, the patterns taking turns.

    Args:
        count: Rows to make, at most 4,800.
        seed: Other seeds give other sentences.

    Raises:
        ConfigError: FG-DATA-013, a count out of range.
    """
    if not 1 <= count <= _MOST_ROWS:
        raise ConfigError(
            "FG-DATA-013", f"count is {count}", allowed=f"1 to {_MOST_ROWS:,}", fix="count=720"
        )
    # One set of decks per pattern: each verb is then equally often a past and a base form.
    dice = [_Dice(seed + turn) for turn in range(len(_PATTERNS))]
    made: dict[str, str] = {}
    while len(made) < count:
        turn = len(made) % len(_PATTERNS)
        prompt, completion = _PATTERNS[turn](dice[turn])
        made.setdefault(prompt, completion)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in made.items()]


def split(
    rows: Sequence[dict[str, str]], heldout: int = 60
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows to train on and the last ``heldout`` rows, which share no sentence.

    Raises:
        ConfigError: FG-DATA-013, nothing would be left to train on.
    """
    if not 1 <= heldout < len(rows):
        raise ConfigError(
            "FG-DATA-013",
            f"heldout is {heldout} of {len(rows)} rows",
            allowed=f"1 to {len(rows) - 1}",
            fix=f"heldout={max(len(rows) // 10, 1)}",
        )
    asked = list(rows[-heldout:])
    seen = {row["prompt"] for row in asked}
    return [row for row in rows[:-heldout] if row["prompt"] not in seen], asked
