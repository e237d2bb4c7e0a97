"""Linear probes of the demo's base by which vector of a text they read.

python -m benchmarks.probes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VECTORS = ("mean", "largest", "first token", "first token, pooled")
"""Of a text's own tokens' last states; the last is what BERT's classification head is given."""


def accuracies() -> dict[str, float]:
    """Returns the test accuracy of a probe on each kind of vector."""
    from graftune.cli.demo import examples
    from graftune.tasks.data import load
    from graftune.tasks.linear_head import best_head
    from graftune.tasks.models import load_base
    from graftune.tasks.resolving import length_limit
    from graftune.tasks.settings import RunSettings
    from graftune.tasks.task import Ready, find_task

    folder = examples("helpdesk")
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    settings, task = RunSettings(base="demo:minilm", data=files), find_task("classification")
    data = load(settings.data, task)
    labels = task.labels(data.splits)
    base = load_base("demo:minilm", "feature")
    limit = length_limit(settings, task, base.model, base.tokenizer)
    ready = Ready(base.model, base.tokenizer, labels, limit)
    vectors = {split: _vectors(task, ready, rows) for split, rows in data.splits.items()}
    number = {label: index for index, label in enumerate(labels)}
    targets = {
        split: torch.tensor([number[example.stratum] for example in rows])
        for split, rows in data.splits.items()
    }
    found: dict[str, float] = {}
    for at, name in enumerate(VECTORS):
        mine = {split: every[at] for split, every in vectors.items()}
        head = best_head(mine, targets, len(labels), by="accuracy")
        said = head.logits(mine["test"]).argmax(dim=-1)
        found[name] = (said == targets["test"]).float().mean().item()
    return found


def _vectors(task: Any, ready: Any, examples: Any) -> list[Tensor]:
    """Returns the vectors of all texts, `(rows, hidden)`, kind by kind."""
    from graftune.tasks.batches import batches_of_like_length

    rows = task.encode(examples, ready).features
    inputs = [{key: row[key] for key in row if key != "labels"} for row in rows]
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in VECTORS]
    for indices, batch in batches_of_like_length(inputs, ready, 32):
        with torch.inference_mode():
            output = ready.model(**batch)
        states, mask = output.last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        kinds = (
            (states * mask).sum(1) / mask.sum(1),
            states.masked_fill(mask == 0, -torch.inf).amax(1),
            states[:, 0],
            output.pooler_output,
        )
        for kind, values in zip(found, kinds, strict=True):
            for index, value in zip(indices, values, strict=True):
                kind[index] = value
    return [torch.stack(kind) for kind in found]


def main() -> None:
    """Prints the table."""
    for name, accuracy in accuracies().items():
        print(f"{name:<22} {accuracy:.1%}")


if __name__ == "__main__":
    main()
