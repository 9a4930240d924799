"""Guesses come from the text, and only from it."""

from __future__ import annotations

from finegraft.inference.lookup import Lookup


def test_what_followed_last_time_is_guessed():
    text = [7, 1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    assert Lookup(text, 10).guess(10) == [4, 5, 6, 9, 1, 2, 3]
    assert Lookup(text, 3).guess(10) == [4, 5, 6]
    assert Lookup(text, 10).guess(2) == [4, 5]
    assert Lookup(text, 10).guess(0) == []


def test_the_longest_end_decides_and_the_latest_place():
    assert Lookup([1, 2, 3, 4, 8, 8, 2, 3, 5, 0, 1, 2, 3], 2).guess(9) == [4, 8]
    assert Lookup([2, 3, 4, 0, 2, 3, 5, 0, 2, 3], 1).guess(9) == [5]


def test_a_text_without_repetition_gives_no_guess():
    assert Lookup(list(range(30)), 10).guess(10) == []
    assert Lookup([5], 10).guess(10) == []
    assert Lookup([], 10).guess(10) == []


def test_text_that_grows_is_looked_up_as_well():
    book = Lookup([1, 2, 3], 4)
    assert book.guess(4) == []
    book.extend([9, 1, 2])
    assert book.guess(4) == [3, 9, 1, 2]


def test_guesses_shrink_where_they_miss_and_grow_where_they_hit():
    book = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], 8)
    book.learn(8, 0)
    assert len(book.guess(8)) == 2
    book.learn(2, 2)
    assert len(book.guess(8)) == 8
    book.learn(0, 0)
    assert len(book.guess(8)) == 8
