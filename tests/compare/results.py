"""Made-up results of runs, shaped like the real ones, for reports and tables."""

from __future__ import annotations

import math
import random
from typing import Any

from graftune.tasks.result import RunResult

LABELS = [
    "activate-device", "alerts", "battery", "billing-question", "calibration", "cancel-plan",
    "change-address", "delivery-status", "firmware-update", "lost-connection", "pairing",
    "privacy", "refund", "warranty", "wrong-reading",
]  # fmt: skip


def confusion(right: float, labels: list[str] = LABELS, rows: int = 18) -> list[list[int]]:
    """Counts of `rows` rows per label, a share `right` of them on the diagonal."""
    rng = random.Random(0)
    table = [[0] * len(labels) for _ in labels]
    for i in range(len(labels)):
        for _ in range(rows):
            j = i if rng.random() < right else rng.randrange(len(labels))
            table[i][j] += 1
    return table


def history(steps: int = 590, every: int = 10, evaluations: int = 10) -> list[dict[str, Any]]:
    """Logged rows: a falling loss each `every` steps and some evaluations."""
    rng = random.Random(1)
    rows: list[dict[str, Any]] = [
        {
            "step": step, "epoch": step / 59, "lr": 1e-3 * (1 - step / steps),
            "loss": 2.7 * math.exp(-step / 120) + 0.05 + rng.random() * 0.1,
            "grad_norm": 1 + rng.random(),
        }
        for step in range(every, steps + 1, every)
    ]  # fmt: skip
    for index in range(1, evaluations + 1):
        share = 1 - math.exp(-index / 2)
        rows.append(
            {
                "step": index * 59, "epoch": index, "eval_loss": 2.7 - 2.2 * share,
                "eval_accuracy": 0.92 * share, "eval_macro_f1": 0.9 * share, "eval_runtime": 0.3,
            }
        )  # fmt: skip
    return rows


def result(name: str = "LoRA", right: float = 0.92, **changes: Any) -> RunResult:
    """One made-up result of a classification run."""
    table = confusion(right, changes.get("labels", LABELS))
    total = sum(map(sum, table))
    accuracy = sum(row[i] for i, row in enumerate(table)) / max(total, 1)
    sites = [
        {"site": f"bert.encoder.layer.{i}.attention.self.{role}", "trainable": 6144, "rank": 8}
        for i in range(6)
        for role in ("query", "key", "value")
    ]
    values: dict[str, Any] = {
        "name": name,
        "kind": "adapter",
        "settings": {
            "base": "demo:minilm", "task": "classification", "name": name,
            "method": {"name": name, "r": 8}, "train": {"lr": 1e-3, "epochs": 10.0},
        },
        "versions": {"python": "3.11.2", "torch": "2.13.0", "graftune": "0.1.0"},
        "history": history(),
        "metrics": {
            "validation": {"accuracy": accuracy, "loss": 0.4},
            "test": {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "mcc": 0.9, "loss": 0.41},
        },
        "confusion": table,
        "labels": LABELS,
        "parameters": {
            "trainable": 301071, "changed": 10616832, "base": 22713216, "share": 301071 / 22713216,
            "bytes": 1204284, "sites": sites,
        },
        "adapter_bytes": 1301222,
        "base_bytes": 90852864,
        "seconds": 42.7,
        "peak_memory_bytes": 812_000_000,
        "adapter_path": f"runs/{name}/adapter",
        "run_dir": f"runs/{name}",
        "data": {"train_rows": 944, "test_rows": total, "cut": 0},
    }  # fmt: skip
    return RunResult(**{**values, **changes})


def predictions(table: list[list[int]], labels: list[str]) -> list[dict[str, Any]]:
    """Rows of a test set that give `table`."""
    return [
        {"text": f"message {k} of {label}", "true": label, "label": labels[j]}
        for i, label in enumerate(labels)
        for j, count in enumerate(table[i])
        for k in range(count)
    ]
