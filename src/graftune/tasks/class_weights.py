"""Weights of classes in the loss, so that rare labels count as much as common ones.

    loss = sum over rows of w[label] * -log p[label] / sum over rows of w[label]
    balanced: w[label] = rows / (labels * rows of that label)

Source: the loss is torch's weighted cross-entropy, the balance scikit-learn's (King and Zeng 2001).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from graftune.errors import SettingsError, nearest
from graftune.tasks.settings import TaskOptions

if TYPE_CHECKING:
    from torch import Tensor

ClassWeights = Literal["balanced"] | dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class ClassificationOptions(TaskOptions):
    """How labels count."""

    class_weights: ClassWeights | None = None
    """Weight of each label in the loss: `balanced` (the rarer, the more), or numbers by label, 1
    for those that aren't named. Default: all count alike."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _labels_are_texts(cls, value: Any) -> Any:
        return (
            {str(key): weight for key, weight in value.items()}
            if isinstance(value, dict)
            else value
        )


def weights_of(chosen: ClassWeights, labels: Sequence[str], strata: Sequence[str]) -> list[float]:
    """Returns the weight of each label.

    Args:
        chosen: What the settings say.
        labels: The labels, by number.
        strata: The training rows' labels.

    Raises:
        SettingsError: A weight is for something else.

    Example:
        >>> weights_of("balanced", ["a", "b"], ["a", "a", "a", "b"])
        [0.6666666666666666, 2.0]
    """
    if chosen == "balanced":
        counts = Counter(strata)
        return [len(strata) / (len(labels) * counts[label]) for label in labels]
    for label in chosen:
        if label not in labels:
            raise SettingsError(
                f'task_options.class_weights: "{label}" is no label; there are '
                f"{', '.join(labels)}.{nearest(label, labels)}"
            )
    return [float(chosen.get(label, 1.0)) for label in labels]


def weighted(model: Any, batch: dict[str, Any], weights: Sequence[float]) -> dict[str, Tensor]:
    """Returns a classifier's `logits` for a batch, and with labels its weighted `loss`."""
    import torch
    import torch.nn.functional as F

    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    if "labels" not in batch:
        return {"logits": logits}
    shown = logits.float()
    weight = torch.tensor(weights, device=shown.device)
    return {"loss": F.cross_entropy(shown, batch["labels"], weight), "logits": logits}
