"""Prompts that start from those of other tasks, chosen by how alike they are (SPoT, Vu et al. 2022,
arXiv 2110.07904).

    best      tune the target from each of the k likest sources; the best on validation rows counts
    average   tune it from the average of the k likest, weighted by similarity
    mixture   train one prompt on the k likest tasks' rows and its own; tune it from that
    rank      only tell how alike they are

The target's own prompt, from a short run or an early checkpoint, says what it is like; equations
are in `similarity`, how tasks are mixed in `mixture`.
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

HOW = ("best", "average", "mixture", "rank")
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
    mixture: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many training rows each task has in the mixture."""

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
    source_settings: Mapping[str, RunSettings] | None = None,
    cap: int | None = None,
    out: str | Path | None = None,
) -> Transfer:
    """Ranks sources by how like a target they are, and tunes the target from the likest.

    The runs lie in a folder of their own, with `transfer.json`; those that are finished there are
    not done again, one that was stopped goes on.

    Args:
        target: directory of a run or an adapter, or of a run's checkpoint: its prompt, early.
        sources: directories of the prompts of other tasks.
        watch: told of every run's progress.
        how: "best", "average", "mixture" or "rank".
        k: how many of the likest are used; None for DEFAULT_K, or all if there are fewer.
        kind: "mean" or "pairs", the similarity.
        settings: of the target's runs; None for those of the run that the target is of.
        source_settings: for a mixture, the task and data of sources by name, where they aren't
            those of the run that a source's directory is in.
        cap: for a mixture, rows of one task at most; None for `mixture.CAP`.
        out: the folder; None puts it beside the target's run, `NAME-transfer`.

    Raises:
        SettingsError: a value can't be, or the prompts have other lengths or are none; or a
            mixture's tasks are of several kinds.
        FormatError: a directory holds no adapter, or one for another base.
        DataError: the data can't be trained on.
    """
    k = _checked(how, kind, k, len(sources))
    named = given.named(target, sources)
    settings = settings or given.settings_of(target)
    folder = Path(out) if out else settings.run_dir.with_name(f"{settings.run_name}-transfer")
    plan = _Plan(settings, folder)
    tasks = _tasks(how, named, source_settings or {}, settings, cap)
    if how != "rank":
        plan.check(how)
    prompts = given.prompts(settings, {given.TARGET: str(target), **named})
    found = _ranked(prompts, named, kind)
    made = Transfer(str(target), how, kind, k, plan.metric, found)
    if how == "best":
        made = plan.best(made, watch)
    elif how == "average":
        made = plan.averaged(made, prompts, watch)
    elif how == "mixture":
        made = plan.mixed(made, tasks, cap, watch)
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

    def mixed(
        self,
        made: Transfer,
        tasks: Mapping[str, RunSettings],
        cap: int | None,
        watch: Watcher,
    ) -> Transfer:
        """Returns a transfer with a run from a prompt trained on the k likest tasks' rows too."""
        from graftune.compare.mixture import CAP, mixed
        from graftune.tasks.run import train

        likest = {source.name: tasks[source.name] for source in made.ranking[: made.k]}
        mixture = mixed(self.settings, likest, given.TARGET, cap or CAP)
        watch.on_note("mixture:")
        start = train(mixture.write(self.folder), watch=watch, resume=True)
        run = self.trained("tuned", start.run_dir, watch)
        return dataclasses.replace(
            made, chosen=run.run_dir, metrics=run.metrics, mixture=mixture.counts
        )

    def trained(self, name: str, start: str, watch: Watcher) -> RunResult:
        """Returns a run of the target from a start, trained unless it is finished already."""
        from graftune.tasks.run import train

        folder = self.folder / name
        watch.on_note(f"{name}:")
        settings = self.settings.replaced(name=name, out=str(folder), start=start)
        return train(settings, watch=watch, resume=True)


def _tasks(
    how: str,
    named: Mapping[str, str],
    told: Mapping[str, RunSettings],
    target: RunSettings,
    cap: int | None,
) -> dict[str, RunSettings]:
    """Returns what each source was trained on; {} where nothing is mixed.

    Raises:
        SettingsError: nothing says so of one, it is of another kind than the target, or what is
            told is of no use.
    """
    from graftune.compare.mixture import check_kinds

    if how != "mixture":
        if told or cap is not None:
            raise SettingsError(f'a mixture alone has source settings and a cap; how is "{how}".')
        return {}
    if cap is not None and cap < 1:
        raise SettingsError(f"cap is {cap}, expected the rows of one task at most: 1 or more.")
    for name in told:
        if name not in named:
            raise SettingsError(
                f'source settings are given for "{name}"; the sources are {", ".join(named)}.'
                f"{nearest(name, named)}"
            )
    found = dict(told)
    for name, path in named.items():
        if name not in told:
            found[name] = given.settings_of(
                path,
                "a mixture needs the task and the training data of every source: give their "
                f"settings (--source-settings {name}=FILE).",
            )
    check_kinds(target, found)
    return found


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
