import pytest
import torch

from graftune.tasks.linear_head import best_head, fit_head


def clouds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    centres = torch.eye(3, 5) * 3
    return centres[targets] + torch.randn(count, 5, generator=draw), targets


def test_it_is_scikit_learns_optimum() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the reference")
    vectors, targets = clouds(90, 0)
    head = fit_head(vectors, targets, 3, penalty=1e-2)
    reference = linear.LogisticRegression(C=1 / (1e-2 * 90), tol=1e-8, max_iter=1000)
    reference.fit(vectors.numpy(), targets.numpy())
    expected = torch.from_numpy(reference.predict_proba(vectors.numpy())).float()
    assert torch.allclose(head.logits(vectors).softmax(-1), expected, atol=1e-3)


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_the_penalty_is_chosen_on_the_validation_data(by: str) -> None:
    (vectors, targets), (others, answers) = clouds(30, 0), clouds(300, 1)
    splits = {"train": vectors, "validation": others}
    head = best_head(splits, {"train": targets, "validation": answers}, 3, by=by)  # type: ignore
    weak = fit_head(vectors, targets, 3, penalty=1e-5)
    right = [(h.logits(others).argmax(-1) == answers).sum() for h in (head, weak)]
    assert right[0] >= right[1]


def test_without_validation_data_a_penalty_is_taken() -> None:
    vectors, targets = clouds(30, 0)
    head = best_head({"train": vectors}, {"train": targets}, 3, by="loss")
    assert (head.logits(vectors).argmax(-1) == targets).float().mean() > 0.8
