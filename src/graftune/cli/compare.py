"""`graftune compare`: many methods and seeds on one task, one budget, one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune.cli.options import AsJson, Debug, Quiet

if TYPE_CHECKING:
    from graftune.compare.outcome import Comparison
    from graftune.compare.settings import CompareSettings

_DATA, _WHAT, _TRAINING, _RUN = "Base and data", "What is compared", "Training", "Comparison"


def compare(
    config: Annotated[
        Path | None,
        typer.Argument(help="Settings file (YAML); flags and --set change what it says."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: a folder, a hub name, a GGUF file, demo:minilm or demo:smollm2.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "--train", help="Training rows, as for train.", rich_help_panel=_DATA
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Validation rows; else a tenth of the data.", rich_help_panel=_DATA),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Test rows; else a fifth of the data.", rich_help_panel=_DATA)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The task, as for train (classification).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Column of the text.", rich_help_panel=_DATA)
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of the label.", rich_help_panel=_DATA)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest text, in tokens.", rich_help_panel=_DATA)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, with settings as in lora:r=4,alpha=8; or probe, full, in-context, "
            "hard-prompt; repeat it, or put commas between names.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="How many seeds (3), or which, with commas.", rich_help_panel=_WHAT),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What each may use: steps=N, epochs=N, seconds=N, parameters=N (or a share below "
            '1) or memory="2 GB".',
            rich_help_panel=_WHAT,
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            help="Multiples of each method's learning rate to try (0.3,1,3); off for none.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    trial: Annotated[
        float | None,
        typer.Option(help="Share of the steps that a trial takes (0.3).", rich_help_panel=_WHAT),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per step.", rich_help_panel=_TRAINING)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_TRAINING),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any setting by its key, as train.warmup=0.1; may be repeated.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="The comparison's folder.", rich_help_panel=_RUN)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The comparison's name.", rich_help_panel=_RUN)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check all, say what would be run, run nothing.", rich_help_panel=_RUN
        ),
    ] = False,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Do again what failed or was left out.", rich_help_panel=_RUN),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods on your rows, with one budget and several seeds.

    Each method gets the same number of trials of its learning rate, chosen on the validation rows,
    then a run for each seed, measured on the test rows. A best one is named only where the seeds
    and the rows say so. What is finished is kept: the same command goes on after Ctrl-C or a crash,
    and with more methods or seeds it does what is missing.

    \b
    Examples:
      graftune compare --base demo:minilm --data mail.csv
      graftune compare --base demo:minilm --data mail.csv --method probe,bitfit,lora,full --seeds 3
      graftune compare --base ./model --data mail.csv --method lora:r=2 --method lora:r=16
      graftune compare --base demo:minilm --data mail.csv --budget parameters=0.01 --search off
      graftune compare compare.yaml --dry-run       how many runs there would be
    """
    flags: dict[str, Any] = {
        "base": base, "task": task, "out": out, "name": name,
        "data.train": data, "data.validation": validation, "data.test": test,
        "data.columns.text": text, "data.columns.label": label, "data.max_length": max_length,
        "methods": _methods(method), "seeds": _seeds(seeds), "budget": _budget(budget),
        "search": _search(search), "trial": trial,
        "train.batch_size": batch_size, "train.precision": precision,
    }  # fmt: skip
    settings = settings_from(config, flags, change or [])
    if dry_run:
        _show_plan(settings, as_json)
        return
    found = _run(settings, retry=retry, quiet=quiet)
    _show(found, as_json)


def settings_from(
    config: Path | None, flags: dict[str, Any], changes: list[str]
) -> CompareSettings:
    """Returns the settings of a file, changed by flags (those that aren't None), then by --set.

    Raises:
        SettingsError: A setting can't be; it says on which line or in which flag.
    """
    from graftune.compare.settings import CompareSettings
    from graftune.errors import SettingsError
    from graftune.tasks.settings_overrides import apply_overrides, parse_override
    from graftune.tasks.settings_yaml import read_settings_file

    file = read_settings_file(config) if config else None
    given = [(tuple(key.split(".")), value) for key, value in flags.items() if value is not None]
    sets = [parse_override(one) for one in changes]
    values = apply_overrides(file.values if file else {}, given + sets)
    if file is None and not (values.get("base") and values.get("data")):
        raise SettingsError(
            "graftune compare needs a base model and data, as in --base demo:minilm --data "
            "mail.csv, or a settings file."
        )
    by_flag, by_set = {key for key, _ in given}, {key for key, _ in sets}

    def where(key: tuple[str, ...]) -> str:
        begun = [key[:length] for length in range(len(key), 0, -1)]
        if any(one in by_set for one in begun):
            return "--set"
        if file is None or any(one in by_flag for one in begun):
            return _flag(key)
        return file.where(key)

    return CompareSettings.from_dict(values, where)


def _flag(key: tuple[str, ...]) -> str:
    if key[:1] in (("methods",), ("budget",), ("seeds",), ("search",)):
        return f"--{key[0].removesuffix('s') if key[0] == 'methods' else key[0]}"
    named = {"train": "data"}
    last = key[-1] if key else ""
    return f"--{named.get(last, last).replace('_', '-')}"


def _methods(given: list[str] | None) -> list[Any] | None:
    """Returns methods from flags: names with commas between them, or one with its settings.

    Example:
        >>> _methods(["probe,full", "lora:r=4,targets=qv"])
        ['probe', 'full', {'name': 'lora', 'r': 4, 'targets': 'qv'}]
    """
    from graftune.errors import SettingsError
    from graftune.tasks.settings_yaml import parse_value

    if given is None:
        return None
    found: list[Any] = []
    for one in given:
        name, colon, rest = one.partition(":")
        if not colon:
            found += [part.strip() for part in one.split(",") if part.strip()]
            continue
        own: dict[str, Any] = {"name": name.strip()}
        for part in rest.split(","):
            key, equals, value = part.partition("=")
            if not equals:
                raise SettingsError(f'--method "{one}": expected key=value, found "{part}".')
            own[key.strip()] = parse_value(value)
        found.append(own)
    return found


def _seeds(text: str | None) -> Any:
    from graftune.cli.intrinsic import numbers

    if text is None:
        return None
    found = numbers("--seeds", text, int)
    return found[0] if len(found) == 1 and "," not in text else list(found)


def _search(text: str | None) -> list[float] | None:
    from graftune.cli.intrinsic import numbers

    if text is None:
        return None
    return [] if text.strip() in ("off", "none") else list(numbers("--search", text, float))


def _budget(text: str | None) -> dict[str, Any] | None:
    from graftune.errors import SettingsError
    from graftune.tasks.settings_yaml import parse_value

    if text is None:
        return None
    key, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f'--budget "{text}" is not of the form key=value, as in steps=200.')
    return {key.strip(): parse_value(value)}


def _run(settings: CompareSettings, *, retry: bool, quiet: bool) -> Comparison:
    from graftune.cli.compare_progress import watcher
    from graftune.compare.run import run

    watch = watcher(quiet=quiet)
    try:
        return run(settings, watch=watch, retry=retry)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "Stopped. What is finished is kept; the same command goes on, or\n"
            f"  graftune compare {settings.folder / 'compare.yaml'}"
        ) from None
    finally:
        watch.close()


def _show(found: Comparison, as_json: bool) -> None:
    from graftune.cli import screen
    from graftune.compare.recommendation import recommendation
    from graftune.compare.report import words
    from graftune.compare.report.methods import COLUMNS, rows

    page = found.settings.folder / "report.html"
    if as_json:
        screen.print_json({**found.to_dict(), "report": str(page)})
        return
    shown = [index for index, column in enumerate(COLUMNS) if column not in ("each seed", "p")]
    table = [[row[index].text for index in shown] for row in rows(found)]
    screen.print_table([COLUMNS[index] for index in shown], table)
    print()
    for sentence in recommendation(found):
        print(sentence)
    print()
    screen.print_pairs([("report", str(page)), ("took", words.duration(found.seconds))])


def _show_plan(settings: CompareSettings, as_json: bool) -> None:
    from graftune.cli import screen
    from graftune.compare.run import plan

    found = plan(settings)
    if as_json:
        screen.print_json(found)
        return
    rows = [
        [
            one["label"],
            str(one["steps"] or "–"),
            "–" if one["lr"] is None else f"{one['lr']:g}",
            ", ".join(f"{lr:g}" for lr in one["trials"]) or "–",
            ", ".join(map(str, one["seeds"])),
        ]
        for one in found["methods"]
    ]
    screen.print_table(["method", "steps", "learning rate", "tried", "seeds"], rows)
    data = ", ".join(f"{count} {split}" for split, count in found["data"]["rows"].items())
    screen.print_pairs(
        [
            ("rows", data),
            ("budget", found["budget"]),
            ("runs", f"{found['runs']}, and {found['trials']} shorter trials before them"),
            ("out", str(settings.folder)),
        ]
    )
