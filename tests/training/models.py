"""A tiny model and examples of varied length, for the training tests."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import FAMILIES, FIRST, LABELS, VOCABULARY


def tiny(name: str = "bert", dropout: float = 0.1) -> Any:
    """Returns a tiny classifier; dropout acts, so that random states matter."""
    return FAMILIES[name].build("classification", dropout=dropout)


def examples(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Returns tokenised examples of 3 to 16 tokens, whose label their first token tells."""
    draw = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        length = int(torch.randint(3, 17, (1,), generator=draw))
        ids = torch.randint(FIRST, VOCABULARY - 1, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": ids[0] % LABELS})
    return rows
