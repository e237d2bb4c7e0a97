"""Training more than once: several seeds, and short runs that find a learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftune.tasks.settings import RunSettings

SEARCH = "search"
"""What --lr says to have the learning rate searched."""


def searched(settings: RunSettings, resume: bool, quiet: bool) -> RunSettings:
    """Returns settings with the learning rate that short runs found, which is said.

    A run that is resumed keeps the one that it was begun with.
    """
    import sys

    from graftune.cli.progress import watcher
    from graftune.tasks import workspace
    from graftune.tasks.rates import search_rate

    first = settings.run_dir
    begun = [
        path for path in (first, first.with_name(f"{first.name}-seed0"))
        if (path / workspace.SETTINGS).is_file()
    ]  # fmt: skip
    if resume and begun:
        lr = workspace.read_settings(begun[0]).train.lr
        return settings.replaced(train={"lr": lr})
    found = search_rate(settings, watch=watcher(quiet=quiet))
    if not quiet:
        print(found.sentence(), file=sys.stderr)
    return settings.replaced(train={"lr": found.best})


def run_seeds(
    settings: RunSettings, count: int, *, resume: bool, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Trains with several seeds, and prints each run's metrics with their mean and spread."""
    from graftune.cli import screen
    from graftune.cli.progress import watcher
    from graftune.compare.report import words
    from graftune.tasks.seeds import spread, train_seeds

    results = train_seeds(
        settings, count, watch=watcher(quiet=quiet), resume=resume, overwrite=overwrite
    )
    found = spread(results)
    if as_json:
        screen.print_json({"runs": [one.to_dict() for one in results], "metrics": found})
        return
    for split, metrics in found.items():
        rows = [
            [
                words.metric_name(key),
                *(words.metric_value(key, one.metrics[split][key]) for one in results),
                f"{words.metric_value(key, of['mean'])} ± {words.metric_value(key, of['sd'])}",
            ]
            for key, of in metrics.items()
        ]
        names = [f"seed {one.settings['train']['seed']}" for one in results]
        screen.print_table([split, *names, "mean ± sd"], rows)
        print()
    screen.print_pairs([("runs", ", ".join(one.run_dir for one in results))])
