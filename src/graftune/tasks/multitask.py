"""Classification of several tasks at once: each has a head of its own, all else is shared.

columns   text (and text_pair), label, which is "TASK/LABEL"
head      the model class's own; a row's softmax is over the labels of its own task alone, so that
          the head's rows for a task are that task's head
metrics   as classification's, each row among its own task's labels
answer    none: nothing says which task a text is of. A run is a start for others (`start`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from graftune.errors import DataError
from graftune.tasks.classification import Classification, class_names
from graftune.tasks.data import Example
from graftune.tasks.settings import TaskOptions
from graftune.tasks.task import Ready, register_task

if TYPE_CHECKING:
    from torch import Tensor

MARK = "/"
"""Stands between a task's name and a label."""


@register_task
class Multitask(Classification):
    """One label of a text's own task."""

    name: ClassVar[str] = "multitask"
    summary: ClassVar[str] = "texts of several tasks, each with its own labels and head"
    options_type: ClassVar[type[TaskOptions]] = TaskOptions

    @property
    def options(self) -> TaskOptions:
        """See `Task.options`; there are none."""
        return TaskOptions()

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns the labels of all tasks, "TASK/LABEL".

        Raises:
            DataError: One has no task; or they can't be learnt.
        """
        for example in splits["train"]:
            task, mark, label = example.stratum.partition(MARK)
            if not (task and mark and label):
                raise DataError(
                    f'{example.where}: the label is "{example.stratum}", expected "TASK/LABEL".'
                )
        return class_names(splits)

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns `logits` (rows, labels), -inf at other tasks' labels, and the `loss`.

        Raises:
            DataError: The batch has no labels, which say of which task each row is.
        """
        import torch
        import torch.nn.functional as F

        if "labels" not in batch:
            raise DataError("multitask: a row without a label is of no task, so it has no answer.")
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        task = torch.tensor(tasks_of(model), device=labels.device)  # (labels,)
        logits = model(**inputs).logits.float()
        logits = logits.masked_fill(task != task[labels][:, None], -torch.inf)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text with the likeliest label of the task that its own label names.

        Raises:
            DataError: A text has no label.
        """
        for example in examples:
            if not example.stratum:
                raise DataError(
                    f"{example.where}: nothing says which task the text is of. A multitask run is "
                    "a start for others: train a task from it (start), and ask that."
                )
        found = super().answer(
            examples, ready, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        return [_within(example, one) for example, one in zip(examples, found, strict=True)]


def tasks_of(model: Any) -> list[int]:
    """Returns the number of each label's task."""
    names: Mapping[int, str] = getattr(model, "module", model).config.id2label
    tasks = [names[index].partition(MARK)[0] for index in range(len(names))]
    numbers = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    return [numbers[task] for task in tasks]


def _within(example: Example, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an answer among the labels of an example's own task."""
    own = example.stratum.partition(MARK)[0] + MARK
    chances: Mapping[str, float] = answer["probabilities"]
    kept = {label: chance for label, chance in chances.items() if label.startswith(own)}
    total = sum(kept.values()) or 1.0
    kept = {label: chance / total for label, chance in kept.items()}
    best = max(kept, key=kept.__getitem__)
    return {**answer, "label": best, "score": kept[best], "probabilities": kept}
