"""The same run with several seeds: what of a result is the method's, and what is luck."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from graftune.errors import SettingsError
from graftune.tasks import workspace
from graftune.tasks.result import RunResult, Watcher
from graftune.tasks.settings import RunSettings


def with_seeds(settings: RunSettings, count: int) -> list[RunSettings]:
    """Returns the settings of runs NAME-seed0, NAME-seed1, …, each in a directory of that name.

    Their seeds are `train.seed`, `train.seed + 1`, …; the splits stay the same.

    Raises:
        SettingsError: There are fewer than two.
    """
    if count < 2:
        raise SettingsError(f"--seeds is {count}: a spread needs two runs or more.")
    return [
        settings.replaced(
            name=f"{settings.run_name}-seed{number}",
            out=f"{settings.run_dir}-seed{number}",
            train={"seed": settings.train.seed + number},
        )
        for number in range(count)
    ]


def train_seeds(
    settings: RunSettings,
    count: int,
    *,
    watch: Watcher | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> list[RunResult]:
    """Returns the results of so many runs that differ in their seeds alone.

    With `resume`, finished ones are read, and the first unfinished one goes on.

    Raises:
        SettingsError: A setting can't be; or a run's directory is taken, before any run begins.
        DataError: The data can't be trained on.
        TrainingError: A run can't go on.
    """
    from graftune.tasks.run import train

    runs = with_seeds(settings, count)
    for one in runs:
        workspace.check_free(one.run_dir, resume=resume, overwrite=overwrite)
    return [train(one, watch=watch, resume=resume, overwrite=overwrite) for one in runs]


def spread(results: Sequence[RunResult]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns `mean`, `sd`, `min` and `max` of each metric of each split.

    The standard deviation is a sample's (n - 1). Metrics that not all runs have are left out.
    """
    return {
        split: {
            key: _of(one.metrics[split][key] for one in results)
            for key in results[0].metrics[split]
            if all(key in one.metrics[split] for one in results)
        }
        for split in results[0].metrics
        if all(split in one.metrics for one in results)
    }


def _of(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "min": min(values),
        "max": max(values),
    }
