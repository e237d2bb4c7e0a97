"""What predictions cost, and after how many of them training an adapter was the cheaper way.

prompts    start + n · seconds per prediction
adapter    training + n · seconds per prediction
break-even n = (training − start) / (seconds of a prompt − seconds of an adapter)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftune.tasks.result import RunResult


@dataclass
class PromptCosts:
    """Tokens run and seconds spent on predictions, and before the first of them."""

    rows: int = 0
    """Predictions made."""
    seconds: float = 0.0
    """Wall time of them."""
    tokens: int = 0
    """Tokens run for them, padding left out."""
    tokens_alone: int = 0
    """Tokens it would have been had every prompt been run whole with every answer."""
    start_seconds: float = 0.0
    """Wall time before the first of them: of what all prompts have in common, or of training."""
    start_tokens: int = 0
    """Tokens run in it."""

    def to_dict(self) -> dict[str, float]:
        """Returns the costs by name."""
        return asdict(self)


def per_prediction(costs: Mapping[str, float], what: str = "seconds") -> float | None:
    """Returns the mean seconds (or tokens) of a prediction; None where none was counted.

    Example:
        >>> per_prediction({"rows": 4, "seconds": 2.0}), per_prediction({})
        (0.5, None)
    """
    rows = costs.get("rows")
    return costs[what] / rows if rows and what in costs else None


def break_even(prompts: Mapping[str, float], adapter: RunResult) -> dict[str, Any]:
    """Returns the costs of an adapter's run, and after how many predictions they are the lower.

    Args:
        prompts: The costs of prompts, as in a result.
        adapter: The result of the adapter's run, whose costs are known.

    Returns:
        `{"name", "run_dir", "costs", "predictions"}`; `predictions` is None if a prompt is never
        slower than the adapter.
    """
    slower, faster = per_prediction(prompts), per_prediction(adapter.costs)
    found = {"name": adapter.name, "run_dir": adapter.run_dir, "costs": adapter.costs}
    if slower is None or faster is None or slower <= faster:
        return {**found, "predictions": None}
    ahead = adapter.costs["start_seconds"] - prompts.get("start_seconds", 0.0)
    return {**found, "predictions": max(0, math.ceil(ahead / (slower - faster)))}
