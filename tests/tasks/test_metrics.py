import math
from typing import Any

import numpy as np
import pytest

from graftune.tasks import metrics


def cases() -> list[tuple[Any, Any, int]]:
    draw = np.random.default_rng(0)
    random = [(draw.integers(0, k, 50), draw.integers(0, k, 50), k) for k in (2, 3, 15)]
    constant = (np.array([0, 1, 2]), np.array([1, 1, 1]), 3)
    perfect = (np.array([0, 1, 2, 2]), np.array([0, 1, 2, 2]), 3)
    absent = (np.array([0, 1, 1]), np.array([0, 1, 0]), 4)
    return [*random, constant, perfect, absent]


@pytest.mark.parametrize(("targets", "said", "classes"), cases())
def test_scores_equal_scikit_learns(targets: Any, said: Any, classes: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
    counts = metrics.confusion(targets, said, classes)
    reference = sklearn.confusion_matrix(targets, said, labels=range(classes))
    assert counts.tolist() == reference.tolist()
    assert metrics.accuracy(counts) == pytest.approx(sklearn.accuracy_score(targets, said))
    macro = sklearn.f1_score(targets, said, average="macro", zero_division=0)
    assert metrics.macro_f1(counts) == pytest.approx(macro)
    assert metrics.matthews(counts) == pytest.approx(sklearn.matthews_corrcoef(targets, said))


def test_class_scores_equal_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
    targets, said, classes = cases()[1]
    found = metrics.class_scores(metrics.confusion(targets, said, classes))
    expected = sklearn.precision_recall_fscore_support(targets, said, zero_division=0)
    for index, score in enumerate(found):
        assert list(score.values()) == pytest.approx([part[index] for part in expected])


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e9, 1) == math.inf


def test_token_accuracy_of_nothing_is_zero() -> None:
    assert metrics.token_accuracy(0, 0) == 0
    assert metrics.token_accuracy(3, 4) == 0.75
