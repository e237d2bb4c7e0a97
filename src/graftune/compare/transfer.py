"""Prompts that start from those of other tasks, chosen by how alike they are (SPoT, Vu et al. 2022,
arXiv 2110.07904).

    best      tune the target from each of the k likest sources; the best on validation rows counts
    average   tune it from the average of the k likest, weighted by similarity
    rank      only tell how alike they are

The target's own prompt, from a short run or an early checkpoint, says what it is like; equations
are in `similarity`. The mixture of source tasks, the paper's third, needs mixed data: not here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.compare import sources as given
from graftune.errors import SettingsError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.result import RunResult, Watcher
    from graftune.tasks.settings import RunSettings

HOW = ("best", "average", "rank")
FILE = "transfer.json"
DEFAULT_K = 3
"""Sources used unless told, or all where there are fewer."""


@dataclass(frozen=True)
class Ranked:
    """One source, and how like the target it is."""

    name: str
    path: str
    similarity: float
    weight: float | None = None
    """Its share of the average start."""
    run_dir: str = ""
    """The target's run that started from it."""
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """What that run was measured at."""


@dataclass(frozen=True)
class Transfer:
    """What a transfer found."""

    target: str
    how: str
    kind: str
    """Which similarity."""
    k: int
    metric: str
    """What the target's runs are chosen by."""
    ranking: tuple[Ranked, ...]
    """The likest first."""
    chosen: str = ""
    """The directory of the run that counts."""
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """What that run was measured at."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the transfer as plain values."""
        return dataclasses.asdict(self)


def transfer(
    target: str | Path,
    sources: Sequence[str | Path],
    watch: Watcher,
    *,
    how: str = "best",
    k: int | None = None,
    kind: str = "mean",
    settings: RunSettings | None = None,
    out: str | Path | None = None,
) -> Transfer:
    """Ranks sources by how like a target they are, and tunes the target from the likest.

    The runs lie in a folder of their own, with `transfer.json`; those that are finished there are
    not done again, one that was stopped goes on.

    Args:
        target: directory of a run or an adapter, or of a run's checkpoint: its prompt, early.
        sources: directories of the prompts of other tasks.
        watch: told of every run's progress.
        how: "best", "average" or "rank".
        k: how many of the likest are used; None for DEFAULT_K, or all if there are fewer.
        kind: "mean" or "pairs", the similarity.
        settings: of the target's runs; None for those of the run that the target is of.
        out: the folder; None puts it beside the target's run, `NAME-transfer`.

    Raises:
        SettingsError: a value can't be, or the prompts have other lengths or are none.
        FormatError: a directory holds no adapter, or one for another base.
        DataError: the data can't be trained on.
    """
    k = _checked(how, kind, k, len(sources))
    named = given.named(target, sources)
    settings = settings or given.settings_of(target)
    folder = Path(out) if out else settings.run_dir.with_name(f"{settings.run_name}-transfer")
    plan = _Plan(settings, folder)
    if how != "rank":
        plan.check(how)
    prompts = given.prompts(settings, {given.TARGET: str(target), **named})
    found = _ranked(prompts, named, kind)
    made = Transfer(str(target), how, kind, k, plan.metric, found)
    if how == "best":
        made = plan.best(made, watch)
    elif how == "average":
        made = plan.averaged(made, prompts, watch)
    _write(made, folder)
    return made


@dataclass(frozen=True)
class _Plan:
    """The settings of the target's runs, and where they lie."""

    settings: RunSettings
    folder: Path

    @property
    def metric(self) -> str:
        """What runs are measured by."""
        from graftune.tasks.task import find_task

        return self.settings.train.metric or find_task(self.settings.task).metric

    def check(self, how: str) -> None:
        """Raises unless the target can be trained, and its runs be compared."""
        from graftune.tasks.run import plan

        rows = plan(self.settings.replaced(start=None))["data"]["rows"]
        if how == "best" and not rows.get("validation"):
            raise SettingsError(
                'how="best" chooses by the validation rows, and there are none: give some '
                '(data.validation, data.validation_fraction), or take how="average".'
            )

    def best(self, made: Transfer, watch: Watcher) -> Transfer:
        """Returns a transfer with a run from each of the k likest, and which did best."""
        from graftune.compare.report.words import LOWER_IS_BETTER

        ranking = list(made.ranking)
        for at, source in enumerate(ranking[: made.k]):
            run = self.trained(f"from-{source.name}", source.path, watch)
            ranking[at] = dataclasses.replace(source, run_dir=run.run_dir, metrics=run.metrics)
        sign = -1 if made.metric in LOWER_IS_BETTER else 1
        best = max(ranking[: made.k], key=lambda s: sign * s.metrics["validation"][made.metric])
        return dataclasses.replace(
            made, ranking=tuple(ranking), chosen=best.run_dir, metrics=best.metrics
        )

    def averaged(self, made: Transfer, prompts: Mapping[str, Tensor], watch: Watcher) -> Transfer:
        """Returns a transfer with the run from the weighted average of the k likest."""
        from graftune.compare.similarity import weighted_average, weights

        likest = made.ranking[: made.k]
        alpha = weights([source.similarity for source in likest])
        ranking = [dataclasses.replace(s, weight=a) for s, a in zip(likest, alpha, strict=True)]
        start = weighted_average([prompts[source.name] for source in likest], alpha)
        given.save(self.settings, start, self.folder / "start")
        run = self.trained("average", str(self.folder / "start"), watch)
        every = (*ranking, *made.ranking[made.k :])
        return dataclasses.replace(made, ranking=every, chosen=run.run_dir, metrics=run.metrics)

    def trained(self, name: str, start: str, watch: Watcher) -> RunResult:
        """Returns a run of the target from a start, trained unless it is finished already."""
        from graftune.tasks.run import train

        folder = self.folder / name
        watch.on_note(f"{name}:")
        settings = self.settings.replaced(name=name, out=str(folder), start=start)
        return train(settings, watch=watch, resume=True)


def _checked(how: str, kind: str, k: int | None, sources: int) -> int:
    """Returns k."""
    from graftune.compare.similarity import KINDS

    for what, value, known in (("how", how, HOW), ("similarity", kind, KINDS)):
        if value not in known:
            raise SettingsError(
                f'{what} is "{value}", expected one of {", ".join(known)}.{nearest(value, known)}'
            )
    if not sources:
        raise SettingsError("a transfer needs prompts of other tasks to start from: none is given.")
    if k is not None and not 1 <= k <= sources:
        raise SettingsError(f"k is {k}, expected 1 to {sources}, the number of sources.")
    return min(DEFAULT_K, sources) if k is None else k


def _ranked(
    prompts: Mapping[str, Tensor], named: Mapping[str, str], kind: str
) -> tuple[Ranked, ...]:
    from graftune.compare.similarity import ranking

    found = ranking(prompts[given.TARGET], {name: prompts[name] for name in named}, kind)
    return tuple(Ranked(name, named[name], value) for name, value in found.items())


def _write(made: Transfer, folder: Path) -> None:
    from graftune.tasks import workspace

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made.to_dict(), indent=2, ensure_ascii=False) + "\n"
    workspace.write_text(folder / FILE, text)
