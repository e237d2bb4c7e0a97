"""`graftune train`: settings from flags or a file, a run, its result, its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune import processes
from graftune.cli.choosing import tell, with_method
from graftune.cli.options import AsJson, Debug, Quiet
from graftune.cli.repeating import SEARCH, run_seeds, searched

if TYPE_CHECKING:
    from graftune.tasks.result import RunResult
    from graftune.tasks.settings import RunSettings

_DATA, _METHOD, _TRAINING, _RUN = "Base and data", "Method", "Training", "Run"


def train(
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
            "--data",
            "--train",
            help="Training rows: CSV, TSV, JSONL, JSON, Parquet or CoNLL file, folder, or data set "
            "name.",
            rich_help_panel=_DATA,
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
            help="classification (default), regression, multilabel, instruct, choices, "
            "multiple-choice, labelling, spans, embedding, seq2seq, lm, masked-lm or images.",
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
        str | None,
        typer.Option(
            help="Method; `graftune methods` lists them. auto: chosen for your rows, with reasons.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What a step may take, as 6GiB (--method auto); else what is here.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank.", rich_help_panel=_METHOD)] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Scale numerator.", rich_help_panel=_METHOD)
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Dropout before the delta.", rich_help_panel=_METHOD)
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Where it acts: a role (attention, qv, ffn, all-linear), module names or a "
            "regular expression; several with commas.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Demonstrations in the prompt (--method in-context).", rich_help_panel=_METHOD
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help='How a row is written in a prompt, as "{text} It was {label}." (--method '
            "in-context).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="An adapter's run: after how many predictions is it cheaper than prompts "
            "(--method in-context)?",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps, instead of epochs.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per step.", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Highest learning rate, or `search`: the best of a few short runs; else the "
            "method's.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of weights, order and dropout.", rich_help_panel=_TRAINING),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="So many runs, NAME-seed0 and on, and their mean and spread.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_TRAINING),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Load the base in 4 or 8 bit: nf4, fp4, int8, torchao-int8 or torchao-int4.",
            rich_help_panel=_TRAINING,
        ),
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
        str | None, typer.Option(help="The run's directory.", rich_help_panel=_RUN)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The run's and the adapter's name.", rich_help_panel=_RUN)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check settings and data, print both, train nothing.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON schema of settings files, for editors, and end.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=_RUN),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=_RUN),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html.", rich_help_panel=_RUN)
    ] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on your rows and measure it on held-out ones.

    Columns are found by their usual names, splits are made where none are given, and everything the
    run used is written beside its result: settings, versions, metrics, adapter, report.html.

    \b
    Examples:
      graftune train --base demo:minilm --data mail.csv --method lora --r 8
      graftune train --base ./model --data pairs.jsonl --method bitfit --epochs 5 --lr 1e-3
      graftune train --base ./model --data mail.csv --method auto --memory 6GiB
      graftune train --base demo:smollm2 --task instruct --data answers.jsonl --steps 200
      graftune train --base demo:smollm2 --data mail.csv --method in-context --shots 8
      graftune train run.yaml --set train.lr=1e-3 --set method.dropout=0.1 --out runs/second
      graftune train run.yaml --lr search --seeds 3
      graftune train run.yaml --dry-run       what it would do, and what is in the data
      graftune train runs/second/run.yaml --resume       after Ctrl-C or a crash

    A settings file says the same with the keys that --dry-run prints.
    """
    if schema:
        _print_schema()
        return
    flags: dict[str, Any] = {
        "base": base, "task": task, "out": out, "name": name,
        "data.train": data, "data.validation": validation, "data.test": test,
        "data.columns.text": text, "data.columns.label": label, "data.max_length": max_length,
        "method": method, "method.r": r, "method.alpha": alpha, "method.dropout": dropout,
        "method.targets": _targets(targets), "method.shots": shots, "method.against": against,
        "method.template": template,
        "train.epochs": epochs, "train.steps": steps, "train.batch_size": batch_size,
        "train.lr": None if lr == SEARCH else lr, "train.seed": seed, "train.precision": precision,
        "train.quantize": quantize,
    }  # fmt: skip
    settings = settings_from(config, flags, change or [])
    settings, reasons = with_method(settings, memory, resume=resume)
    if dry_run:
        _show_plan(settings, as_json, reasons)
        return
    tell(reasons, quiet)
    if lr == SEARCH or seeds is not None:
        processes.refuse_several("--lr search and --seeds")
    if lr == SEARCH:
        settings = searched(settings, resume, quiet)
    if seeds is not None:
        run_seeds(settings, seeds, resume=resume, overwrite=overwrite, quiet=quiet, as_json=as_json)
        return
    processes.start()
    result = _run(settings, resume, overwrite, quiet)
    processes.stop()
    if not processes.is_first():
        return
    page = _report(result) if report else None
    show_result(result, page, as_json)


def settings_from(config: Path | None, flags: dict[str, Any], changes: list[str]) -> RunSettings:
    """Returns the settings of a file, changed by flags (those that aren't None), then by --set.

    Raises:
        SettingsError: A setting can't be; it says on which line or in which flag.
    """
    from graftune.errors import SettingsError
    from graftune.tasks.settings import RunSettings
    from graftune.tasks.settings_overrides import apply_overrides, parse_override
    from graftune.tasks.settings_yaml import read_settings_file

    file = read_settings_file(config) if config else None
    values = file.values if file else {}
    given = [(tuple(key.split(".")), value) for key, value in flags.items() if value is not None]
    given = [one for one in given if one[0] != ("method",) or not _same_method(values, one[1])]
    sets = [parse_override(text) for text in changes]
    values = apply_overrides(values, given + sets)
    if file is None and not (values.get("base") and values.get("data")):
        raise SettingsError(
            "graftune train needs a base model and data, as in --base demo:minilm --data mail.csv, "
            "or a settings file."
        )
    by_flag, by_set = {key for key, _ in given}, {key for key, _ in sets}

    def where(key: tuple[str, ...]) -> str:
        if key in by_set:
            return "--set"
        return _flag(key) if file is None or key in by_flag else file.where(key)

    return RunSettings.from_dict(values, where)


def show_result(result: RunResult, page: Path | None, as_json: bool) -> None:
    """Prints a run's result and what to do next."""
    from graftune.cli import screen
    from graftune.compare.report import words

    if as_json:
        screen.print_json({**result.to_dict(), "report": str(page) if page else None})
        return
    splits = list(result.metrics)
    keys = dict.fromkeys(key for scores in result.metrics.values() for key in scores)
    rows = [
        [words.metric_name(key)]
        + [words.metric_value(key, result.metrics[split].get(key)) for split in splits]
        for key in keys
    ]
    screen.print_table([result.name, *splits], rows)
    screen.print_classes(result.classes)
    parameters = result.parameters
    screen.print_pairs(
        [
            ("trained", f"{words.number(parameters.get('trainable'))} parameters, "
                        f"{words.percent(parameters.get('share'))} of the base"),
            *_costs(result),
            ("adapter", f"{result.adapter_path} ({words.size(result.adapter_bytes)})"),
            ("took", f"{words.duration(result.seconds)}, "
                     f"peak memory {words.size(result.peak_memory_bytes)}"),
            *([("report", str(page))] if page else []),
            ("next", f"graftune predict {result.run_dir} {_asked(result)}"),
        ]
    )  # fmt: skip


def _asked(result: RunResult) -> str:
    """Returns how the next thing is asked: spans need a passage beside the question."""
    return "--data FILE" if result.settings.get("task") == "spans" else '"some text"'


def _costs(result: RunResult) -> list[tuple[str, str]]:
    """Returns what a prediction took, and how prompts compare with an adapter, if known."""
    from graftune.compare.report import break_even, words
    from graftune.tasks.prompt_costs import per_prediction

    seconds, tokens = per_prediction(result.costs), per_prediction(result.costs, "tokens")
    if seconds is None or tokens is None:
        return []
    said = f"{words.moment(seconds)}, {tokens:,.0f} tokens"
    alone = per_prediction(result.costs, "tokens_alone")
    if alone is not None and alone > tokens:
        said += f" ({alone:,.0f} without sharing)"
    compared = break_even.sentence(result.to_dict())
    return [("prediction", said), *([("cost", compared)] if compared else [])]


def _run(settings: RunSettings, resume: bool, overwrite: bool, quiet: bool) -> RunResult:
    from graftune.cli.progress import watcher
    from graftune.tasks.run import train as train_run

    is_quiet = quiet or not processes.is_first()
    try:
        return train_run(
            settings, watch=watcher(quiet=is_quiet), resume=resume, overwrite=overwrite
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(settings.run_dir)) from None


def _how_to_go_on(run_dir: Path) -> str:
    kept = sorted((run_dir / "checkpoints").glob("checkpoint-*")) if run_dir.is_dir() else []
    if not kept:
        return "Stopped before the first checkpoint; nothing is kept."
    return (
        f"Stopped. The last checkpoint is kept in {run_dir / 'checkpoints'}; go on with:\n"
        f"  graftune train {run_dir / 'run.yaml'} --resume"
    )


def _report(result: RunResult) -> Path:
    from graftune.compare.report import write_report

    return write_report(result, Path(result.run_dir) / "report.html")


def _show_plan(settings: RunSettings, as_json: bool, reasons: Sequence[str]) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words
    from graftune.tasks.run import plan

    found = plan(settings)
    if as_json:
        screen.print_json({**found, **({"reasons": list(reasons)} if reasons else {})})
        return
    print(_as_yaml(found["settings"]))
    screen.print_pairs([(f"data.{key}", value) for key, value in words.flatten(found["data"])])
    if found.get("prompt"):
        print(f"\nThe first question's prompt:\n\n{found['prompt']}\n")
    for note in (*found.get("notes", ()), *reasons):
        print(note)


def _print_schema() -> None:
    from graftune.cli import screen
    from graftune.tasks.settings import RunSettings

    screen.print_json(RunSettings.json_schema())


def _as_yaml(settings: dict[str, Any]) -> str:
    """Returns resolved settings as a settings file's text."""
    from graftune.tasks.settings_yaml import dump

    return dump(settings)


def _same_method(values: dict[str, Any], name: str) -> bool:
    """Whether a file's method is the named one, whose settings then stay."""
    said = values.get("method")
    said = said.get("name") if isinstance(said, dict) else said
    return isinstance(said, str) and said.lower() == name.lower()


def _targets(text: str | None) -> Any:
    """Returns comma-separated targets as a list, a single one as it is."""
    if text is None or "," not in text:
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _flag(key: tuple[str, ...]) -> str:
    named = {"train": "data"}
    last = key[-1] if key else ""
    return f"--{named.get(last, last).replace('_', '-')}"
