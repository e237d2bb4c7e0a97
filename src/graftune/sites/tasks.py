"""Which task each row of a batch is of, for adapters that have several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftune.errors import AdapterError

SAY = (
    "say whose each row is: model(..., task_ids=ids), or gt.using(model, name, tasks=ids) where "
    "the call takes no more arguments, as generate"
)


def tasks_of_rows(given: Any, rows: int, device: torch.device, copies: int = 1) -> Tensor | None:
    """Returns the task of every row, `(rows,)` int64; None where none is said.

    Args:
        given: one number for all rows, or one for each; of more rows (beams), each number is for
            as many neighbours.
        rows: of the batch.
        device: of the batch.
        copies: how often the batch as it was given stands in this one, one after the other.

    Raises:
        AdapterError: these are no whole numbers, or too few or many.
    """
    if given is None or (isinstance(given, tuple) and not given):
        return None
    found = torch.as_tensor(given, device=device)
    if found.ndim > 1 or found.is_floating_point() or found.is_complex() or not found.numel():
        raise AdapterError(
            "Tasks are one whole number, or one for each row of the batch; found "
            f"{found.dtype} of shape {tuple(found.shape)}."
        )
    found = found.reshape(-1).long()
    found = found.repeat(copies if len(found) > 1 else 1)
    if rows % len(found):
        raise AdapterError(
            f"{len(found) // copies} tasks are given for a batch of {rows // copies} rows: give "
            "one for each row."
        )
    return found.repeat_interleave(rows // len(found))


def checked_tasks(tasks: Tensor | None, count: int, name: str) -> Tensor | None:
    """Returns the tasks of the rows that an adapter acts on, each in range; None for the only one.

    Args:
        tasks: as said, `(rows,)`.
        count: how many the adapter has.
        name: the adapter's.

    Raises:
        AdapterError: none is said and there are several, or one is out of range.
    """
    if tasks is None:
        if count > 1:
            raise AdapterError(f'Adapter "{name}" has {count} tasks: {SAY}.')
        return None
    low, high = (int(end) for end in tasks.aminmax())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise AdapterError(
            f'Task {wrong} is not one of adapter "{name}", which has {count}: 0 to {count - 1}.'
        )
    return tasks
