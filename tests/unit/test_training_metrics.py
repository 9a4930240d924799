"""Measures against values worked out by hand, or by their definition with numpy."""

from __future__ import annotations

import numpy as np
import pytest

from finegraft.data.labels import CLASSES, SEVERAL, VALUES
from finegraft.training import metrics


def test_classes_by_hand():
    true, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    found = metrics.classes(true, said, ["a", "b", "c"])
    assert found["confusion"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["per_class"]["a"] == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "rows": 3}
    )
    assert found["per_class"]["c"]["f1"] == 0 and found["per_class"]["c"]["rows"] == 1
    assert found["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)


def test_a_class_that_is_nowhere_does_not_count():
    found = metrics.classes(np.array([0, 1]), np.array([0, 1]), ["a", "b", "never"])
    assert found["macro_f1"] == 1.0 and found["accuracy"] == 1.0


def test_several_labels_by_hand():
    true = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    said = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    found = metrics.several(true, said, ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((1 + 1 + 0) / 3)


def test_values_by_definition():
    rng = np.random.default_rng(0)
    true, said = rng.normal(size=50), rng.normal(size=50)
    found = metrics.values(true, said)
    assert found["mse"] == pytest.approx(((true - said) ** 2).mean())
    assert found["mae"] == pytest.approx(np.abs(true - said).mean())
    assert found["pearson"] == pytest.approx(np.corrcoef(true, said)[0, 1])
    ranks = [np.argsort(np.argsort(x)) for x in (true, said)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_equal_values_share_a_rank_and_constants_do_not_correlate():
    assert metrics._ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    found = metrics.values(np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0]))
    assert found["pearson"] == found["spearman"] == 0.0


def test_each_problem_reads_the_logits_its_own_way():
    logits = np.array([[2.0, -1.0], [0.1, 0.3]])
    names = ["a", "b"]
    assert metrics.measure(CLASSES, names, logits, np.array([0, 1]))["accuracy"] == 1.0
    several = metrics.measure(SEVERAL, names, logits, np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert several["accuracy"] == 1.0
    values = metrics.measure(VALUES, [], logits[:, :1], np.array([2.0, 0.1]))
    assert values["mse"] == 0.0
    for problem, found in ((SEVERAL, several), (VALUES, values)):
        assert set(metrics.CHOICES[problem]) - {"loss"} <= set(metrics.numbers(found))
    assert "per_class" not in metrics.numbers(several)
