"""A learning rate by trial: a few short runs, and the best of them on the validation data.

The rates are multiples of the method's own default. The test rows are neither trained on nor looked
at. Each short run has its whole schedule, warm-up and decay, in its few steps.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftune.errors import SettingsError, TrainingError
from graftune.tasks.result import Silent, Watcher
from graftune.tasks.settings import RunSettings

FACTORS = (0.1, 0.3, 1.0, 3.0)
"""What the method's default is multiplied by."""
SHARE = 0.25
"""Share of the run's steps that each trial takes."""
LEAST_STEPS = 20
"""Steps of a trial at least, where the run itself has as many."""


@dataclass(frozen=True)
class Rates:
    """What the trials found."""

    metric: str
    """What was compared, on the validation data."""
    steps: int
    """Steps of each trial."""
    tried: dict[float, float | None]
    """The metric of each learning rate; None where the loss was no longer finite."""
    best: float
    """The learning rate with the best metric; of equal ones the one nearest the default."""

    def sentence(self) -> str:
        """Returns what was found, to be shown."""
        rows = ", ".join(
            f"{rate:g}: {'not finite' if value is None else f'{value:.4g}'}"
            for rate, value in self.tried.items()
        )
        at = [rate for rate in (min(self.tried), max(self.tried)) if rate == self.best]
        edge = " It lies at the edge of what was tried; a further one may be better." if at else ""
        return (
            f"Learning rate {self.best:g}: the best {self.metric} on the validation data after "
            f"{self.steps} steps each ({rows}).{edge}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self)


def search_rate(
    settings: RunSettings,
    *,
    factors: Sequence[float] = FACTORS,
    share: float = SHARE,
    watch: Watcher | None = None,
) -> Rates:
    """Returns the best of several learning rates for a run, by short trials of it.

    Args:
        settings: The run's.
        factors: What the method's default learning rate is multiplied by.
        share: Share of the run's steps that each trial takes.
        watch: Who is told of each trial.

    Raises:
        SettingsError: A setting can't be; or nothing is trained; or there is no validation data.
        DataError: The data can't be trained on.
        TrainingError: With no rate the loss stays finite.
    """
    from graftune.tasks.fitting import total_steps
    from graftune.tasks.in_context import is_in_context
    from graftune.tasks.measured import LOWER_IS_BETTER
    from graftune.tasks.resolving import method_of
    from graftune.tasks.training_run import TrainingRun

    if is_in_context(settings.method):
        raise SettingsError("--lr search: prompts have no learning rate, as nothing is trained.")
    watch = watch or Silent()
    run = TrainingRun.prepared(settings, Silent())
    if "validation" not in run.data.splits:
        raise SettingsError("--lr search needs validation data, and there is none.")
    total = total_steps(run.settings, len(run.data.splits["train"]))
    steps = min(total, max(LEAST_STEPS, round(total * share)))
    metric = run.settings.train.metric or "loss"
    default = method_of(settings.method).default_lr
    tried: dict[float, float | None] = {}
    for factor in factors:
        rate = float(f"{factor * default:.3g}")
        tried[rate] = _tried(settings, rate, steps, metric)
        found = "not finite" if tried[rate] is None else f"{metric} {tried[rate]:.4g}"
        watch.on_note(f"Learning rate {rate:g}: {found} after {steps} steps.")
    sign = 1 if metric in LOWER_IS_BETTER else -1
    finite = {rate: value for rate, value in tried.items() if value is not None}
    if not finite:
        raise TrainingError(
            f"with none of the learning rates {', '.join(f'{rate:g}' for rate in tried)} the loss "
            "stays finite."
        )
    best = min(finite, key=lambda rate: (sign * finite[rate], abs(math.log(rate / default))))
    return Rates(metric, steps, tried, best)


def _tried(settings: RunSettings, rate: float, steps: int, metric: str) -> float | None:
    """Returns the validation metric of a trial, None where it isn't finite; nothing of it stays."""
    from graftune.tasks.training_run import TrainingRun

    with tempfile.TemporaryDirectory(prefix="graftune-lr-") as folder:
        trial = settings.replaced(
            out=str(Path(folder) / "trial"),
            train={
                **{"lr": rate, "steps": steps, "epochs": None, "early_stop": None},
                **{"eval_every": 0, "save_every": 0, "select": "last", "report_to": []},
            },
        )
        run = TrainingRun.prepared(trial, Silent())
        run.data.splits.pop("test", None)
        try:
            found = run.run(resume=False, overwrite=False).metrics["validation"][metric]
        except TrainingError:
            return None
    return found if math.isfinite(found) else None
