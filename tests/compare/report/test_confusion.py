import numpy as np
import pytest

from graftune.compare.report.confusion import class_rows, worst_confusions


def test_scores_by_class_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="an independent count of the scores")
    rng = np.random.default_rng(0)
    true, guess = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    matrix = metrics.confusion_matrix(true, guess).tolist()
    expected = metrics.precision_recall_fscore_support(true, guess)
    rows = class_rows(matrix, list("abcd"))
    for index, row in enumerate(rows):
        found = (row.precision, row.recall, row.f1, row.support)
        assert found == pytest.approx(tuple(column[index] for column in expected))


def test_worst_confusions_come_first_with_their_rows():
    rows = [
        {"text": "hello", "true": "a", "label": "b"},
        {"text": "x", "true": "a", "label": "a"},
    ]
    found = worst_confusions([[1, 3, 0], [0, 5, 1], [0, 0, 2]], ["a", "b", "c"], rows)
    assert [(one.label, one.predicted, one.count, one.support) for one in found] == [
        ("a", "b", 3, 4),
        ("b", "c", 1, 6),
    ]
    assert found[0].examples == ("hello",)


def test_long_examples_are_cut_and_pairs_are_joined():
    row = {"text": "w" * 1000, "text_pair": "second", "true": "a", "label": "b"}
    assert len(worst_confusions([[0, 1], [0, 0]], ["a", "b"], [row])[0].examples[0]) == 240
    row["text"] = "first"
    assert "second" in worst_confusions([[0, 1], [0, 0]], ["a", "b"], [row])[0].examples[0]
