"""Weights of classes: the loss is torch's, the balance scikit-learn's, and runs train with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from graftune.errors import SettingsError
from graftune.tasks import run
from graftune.tasks.class_weights import weights_of
from graftune.tasks.classification import Classification
from graftune.tasks.data import Example
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Task, find_task
from tests.tasks import tiny


def examples(labels: list[str]) -> list[Example]:
    return [
        Example({"text": "t", "label": one}, "t", one, f"row {n}") for n, one in enumerate(labels)
    ]


def prepared(weights: Any, labels: list[str]) -> Task:
    task = find_task("classification", {"class_weights": weights})
    task.labels({"train": examples(labels)})
    return task


class Fixed(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **batch: Any) -> Any:
        assert "labels" not in batch
        return type("Out", (), {"logits": self.logits})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_torchs_weighted_cross_entropy(dtype: torch.dtype) -> None:
    labels = ["a"] * 6 + ["b"] * 2 + ["c"]
    task = prepared("balanced", labels)
    model = Fixed(torch.randn(5, 3).to(dtype))
    targets = torch.tensor([0, 1, 2, 2, 0])
    loss = task.forward(model, {"input_ids": targets, "labels": targets})["loss"]
    weight = torch.tensor([9 / (3 * 6), 9 / (3 * 2), 9 / 3])
    right = torch.nn.CrossEntropyLoss(weight=weight)(model.logits.float(), targets)
    assert torch.equal(loss, right)
    loss.backward()
    assert model.logits.grad is not None
    assert model.logits.grad.abs().sum() > 0


def test_balanced_is_scikit_learns() -> None:
    strata = ["x"] * 7 + ["y"] * 2 + ["z"] * 5
    right = compute_class_weight("balanced", classes=np.array(["x", "y", "z"]), y=np.array(strata))
    assert weights_of("balanced", ["x", "y", "z"], strata) == pytest.approx(right.tolist())


def test_numbers_by_label_leave_the_others_at_one() -> None:
    assert weights_of({"b": 3.0}, ["a", "b"], ["a", "b"]) == [1.0, 3.0]
    assert prepared({1: 2}, ["0", "1"]).options.model_dump() == {"class_weights": {"1": 2.0}}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"spma": 2}, 'Did you mean "spam"'),
        ({"spam": 0}, "class_weights"),
        ({"spam": float("nan")}, "class_weights"),
        ("equal", "class_weights"),
    ],
)
def test_wrong_weights_are_refused(weights: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        prepared(weights, ["spam", "ham"])


def test_without_weights_the_model_computes_its_own_loss() -> None:
    assert not Classification().has_own_forward
    assert prepared("balanced", ["a", "b"]).has_own_forward


def test_multitask_has_no_weights() -> None:
    with pytest.raises(SettingsError, match="multitask has none"):
        find_task("multitask", {"class_weights": "balanced"})


def test_a_run_with_weights_finds_the_rare_label_more_often(tmp_path: Path) -> None:
    base = str(tiny.bert(tmp_path / "bert"))
    # The texts say nothing of the label, so that its share alone decides.
    rows = [{"text": row["text"], "label": "rare" if n % 5 == 0 else "usual"}
            for n, row in enumerate(tiny.mail(100))]  # fmt: skip
    data = str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    found: dict[str, int] = {}
    for name, options in (("plain", {}), ("weighted", {"class_weights": {"rare": 50}})):
        result = run.train(
            RunSettings(
                base=base, data=data, method="lora", out=str(tmp_path / name), task_options=options,
                train={"epochs": 2, "lr": 1e-2, "head_start": False, "select": "last"},
            )
        )  # fmt: skip
        answered = np.array(result.confusion).sum(axis=0)
        found[name] = int(answered[result.labels.index("rare")])
    assert found["plain"] == 0
    assert found["weighted"] > 10
