"""The intrinsic dimension of a task: the smallest d with which SAID does nearly as well as full
fine-tuning (Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255).

    d90 = min {d : metric(d) >= 0.9 * metric(full fine-tuning)}

Each d is a run of its own, under the same budget; of several learning rates the best on the
validation rows counts. New heads begin at random in all runs: one that begins as a linear probe
would already be most of what the smallest d reaches.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import SettingsError

if TYPE_CHECKING:
    from graftune.tasks.result import RunResult, Watcher
    from graftune.tasks.settings import RunSettings

DIMS = (200, 500, 1000, 2000, 5000, 10_000)
"""The values of d that are tried unless others are named."""
FALLING = ("loss", "perplexity")
"""Metrics of which less is better: a share of them means nothing."""


@dataclass(frozen=True)
class Point:
    """One value of d, and how well the best of its learning rates did."""

    d: int
    lr: float
    value: float
    """The metric on held-out rows."""
    seconds: float
    run_dir: str


@dataclass(frozen=True)
class Dimension:
    """What a search found."""

    metric: str
    share: float
    """Which share of the reference counts as reached."""
    reference: float
    """Full fine-tuning's metric, or what was given in its place."""
    reference_from: str
    """The run's directory it is from; "" where it was given."""
    points: tuple[Point, ...]
    """By rising d."""

    @property
    def bar(self) -> float:
        """The value that d90 must reach."""
        return self.share * self.reference

    @property
    def found(self) -> int | None:
        """The smallest d that reaches the bar, None if none does."""
        return next((p.d for p in self.points if p.value >= self.bar - 1e-9), None)

    @property
    def name(self) -> str:
        """What the dimension is called: "d90" for a share of 0.9."""
        return f"d{100 * self.share:g}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the search as plain values, with "bar" and "found"."""
        return {**dataclasses.asdict(self), "bar": self.bar, "found": self.found}


def search(
    settings: RunSettings,
    watch: Watcher,
    *,
    dims: Sequence[int] = DIMS,
    lrs: Sequence[float] = (),
    full_lrs: Sequence[float] = (),
    share: float = 0.9,
    reference: float | None = None,
) -> Dimension:
    """Trains what is missing of a search in `settings.run_dir`, and returns what was found.

    Runs that are finished there are not done again, one that was stopped goes on.

    Args:
        settings: base, data and budget of every run; a method other than SAID is an error.
        watch: told of every run's progress.
        dims: the values of d.
        lrs: learning rates tried for each; none: that of the settings, else SAID's own.
        full_lrs: those tried for full fine-tuning; none: its own.
        share: of the reference, above 0 up to 1.
        reference: the metric to compare with, instead of full fine-tuning's.

    Raises:
        SettingsError: a value can't be, or the directory holds a search with other settings.
        DataError: the data can't be trained on.
    """
    plan = _Plan(settings, tuple(sorted(set(dims))), tuple(lrs), tuple(full_lrs), share)
    plan.check()
    plan.check_sizes()
    origin = ""
    if reference is None:
        _, full = plan.best("full", {"name": "FullFineTuning"}, plan.full_lrs, watch)
        reference, origin = plan.value(full), full.run_dir
    points = tuple(plan.point(d, watch) for d in plan.dims)
    found = Dimension(plan.metric, share, reference, origin, points)
    _write(found, Path(plan.settings.run_dir))
    return found


@dataclass(frozen=True)
class _Plan:
    """The settings of a search, and its runs."""

    settings: RunSettings
    dims: tuple[int, ...]
    lrs: tuple[float, ...]
    full_lrs: tuple[float, ...]
    share: float

    def check(self) -> None:
        """Raises unless every run can be made."""
        from graftune.tasks.resolving import method_of

        if not self.dims:
            raise SettingsError("a search needs one value of d or more; name them, as 200,1000.")
        if not 0 < self.share <= 1:
            raise SettingsError(f"share is {self.share:g}, expected above 0 and at most 1.")
        if any(not lr > 0 for lr in (*self.lrs, *self.full_lrs)):
            found = [*self.lrs, *self.full_lrs]
            raise SettingsError(f"a learning rate is above 0, found {found}.")
        for d in self.dims:
            method_of(self.said(d))
        if self.metric in FALLING:
            raise SettingsError(
                f"{self.share:.0%} of a {self.metric} means nothing; name a metric that rises with "
                "quality, as in --set train.metric=token_accuracy."
            )

    def check_sizes(self) -> None:
        """Raises unless the base has room for every d."""
        from graftune.anatomy.discovery import anatomy
        from graftune.tasks.models import load_base
        from graftune.tasks.resolving import method_of
        from graftune.tasks.task import find_task

        task = find_task(self.settings.task)
        labels = ["0", "1"] if task.model_task == "classification" else None
        model = load_base(self.settings.base, task.model_task, labels=labels).model
        parts = anatomy(model)
        for d in (self.dims[0], self.dims[-1]):
            method_of(self.said(d)).count(model, parts)

    @property
    def metric(self) -> str:
        """What runs are measured by."""
        from graftune.tasks.task import find_task

        return self.settings.train.metric or find_task(self.settings.task).metric

    def said(self, d: int) -> dict[str, Any]:
        """Returns SAID's settings with one d."""
        from graftune.tasks.resolving import method_of

        given = dict(self.settings.method)
        if method_of({"name": given["name"]}).name != "SAID":
            raise SettingsError(
                f"the intrinsic dimension is SAID's d; the settings name {given['name']}. Leave "
                "the method out, or set SAID's own settings."
            )
        return {**given, "name": "SAID", "d": d}

    def point(self, d: int, watch: Watcher) -> Point:
        """Returns the best run of one d."""
        lrs = self.lrs or ((self.settings.train.lr,) if self.settings.train.lr else ())
        lr, best = self.best(f"d{d}", self.said(d), lrs, watch)
        return Point(d, lr, self.value(best), best.seconds, best.run_dir)

    def best(
        self, name: str, method: dict[str, Any], lrs: Sequence[float], watch: Watcher
    ) -> tuple[float, RunResult]:
        """Returns the learning rate that does best on the validation rows, and its run."""
        from graftune.methods.base import find

        lrs = lrs or (find(method["name"]).default_lr,)
        runs = [(lr, self.trained(f"{name}-lr{lr:g}", method, lr, watch)) for lr in lrs]
        return max(runs, key=lambda run: self.value(run[1], "validation"))

    def trained(self, name: str, method: dict[str, Any], lr: float, watch: Watcher) -> RunResult:
        """Returns a run, trained unless it is finished already."""
        from graftune.tasks.run import train

        folder = Path(self.settings.run_dir) / name.replace(".", "_")
        settings = self.settings.replaced(
            method=method,
            name=folder.name,
            out=str(folder),
            train={"lr": lr, "head_start": False, "metric": self.metric},
        )
        watch.on_note(f"{folder.name}:")
        return train(settings, watch=watch, resume=True)

    def value(self, run: RunResult, split: str = "test") -> float:
        """Returns a run's metric on a split, or on the other if it has no such rows."""
        other = "validation" if split == "test" else "test"
        found = run.metrics.get(split) or run.metrics.get(other) or {}
        return float(found[self.metric])


def _write(found: Dimension, folder: Path) -> None:
    from graftune.compare.report.intrinsic import write_page
    from graftune.tasks import workspace

    text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n"
    workspace.write_text(folder / "dimension.json", text)
    write_page(found, folder / "report.html")
