"""Images of digits with LoRA: a ViT learns them, is saved, and answers from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import graftune as gt
from graftune.errors import TrainingError
from tests.training.runs import args


def vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, num_labels=10, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def digits() -> list[dict[str, Tensor]]:
    """Returns scikit-learn's 1,797 images of 8 x 8, from -1 to 1."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return [
        {"pixel_values": image, "labels": torch.tensor(int(label))}
        for image, label in zip(images, found.target, strict=True)
    ]


def scores(model: Any, rows: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits


def accuracy(model: Any, rows: list[dict[str, Tensor]]) -> float:
    labels = torch.stack([row["labels"] for row in rows])
    return float((scores(model, rows).argmax(-1) == labels).float().mean())


def test_a_vit_learns_digits_with_lora_and_answers_from_its_file(tmp_path: Path) -> None:
    rows = digits()
    train, test = rows[:1200], rows[1200:]
    model = vit()
    gt.attach(model, gt.LoRA(r=8, targets="all-linear"), name="digits", seed=0)
    assert accuracy(model, test) < 0.3
    chosen = args(
        tmp_path,
        per_device_train_batch_size=64,
        num_train_epochs=8,
        learning_rate=5e-3,
        gradient_checkpointing=True,
        save_strategy="no",
    )
    gt.Trainer(model, chosen, train_dataset=train).train()
    assert accuracy(model, test) > 0.8
    gt.adapters(model)["digits"].save(tmp_path / "digits")
    fresh = vit()
    gt.load(fresh, tmp_path / "digits", name="digits")
    assert torch.equal(scores(fresh, test), scores(model, test))
    gt.merge(fresh, "digits")
    torch.testing.assert_close(scores(fresh, test), scores(model, test), atol=1e-4, rtol=1e-4)


def test_a_loss_of_images_is_not_in_pieces(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="ViTForImageClassification has no head of the vocab"):
        gt.Trainer(vit(), args(tmp_path), train_dataset=[], loss_chunk=8)
