"""`graftune demo`: the whole way on real messages, in minutes, with nothing to prepare."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune.cli.options import AsJson, Debug, Quiet

if TYPE_CHECKING:
    from graftune.tasks.result import RunResult

MARK = "graftune-demo.json"
"""The file by which the demo knows a folder as its own."""

RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("probe", "linear probe", {}),
    ("lora", "LoRA", {"method": {"name": "lora", "r": 8, "alpha": 16}, "train": {"epochs": 4}}),
    (
        "full",
        "full fine-tuning",
        {"method": {"name": "FullFineTuning"}, "train": {"epochs": 3, "lr": 1e-4}},
    ),
)
"""Folder, name and settings of each run, in the order they are trained."""


def demo(
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Teach a small chat model a house style instead."),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Where everything is written; a new folder or a demo's own.")
    ] = Path("graftune-demo"),
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train on real input and compare, in minutes.

    The demo sorts a help desk's messages into 15 intents with MiniLM: a linear probe of the
    untouched base, LoRA, and full fine-tuning, all measured on the same held-out messages. The
    adapter is then loaded in a new process, where it must give the same predictions.

    With --chat, SmolLM2 answers questions before and after a short LoRA run.

    \b
    Examples:
      graftune demo
      graftune demo --chat --out /tmp/chat
    """
    claim(out)
    if chat:
        from graftune.cli.demo_chat import run_chat

        run_chat(out, as_json=as_json, quiet=quiet)
    else:
        _run_helpdesk(out, as_json=as_json, quiet=quiet)


def claim(out: Path) -> None:
    """Makes the demo's folder, or takes an earlier demo's.

    Raises:
        SettingsError: The folder holds files that aren't a demo's.
    """
    from graftune.errors import SettingsError

    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise SettingsError(
            f'"{out}" holds files that are not a demo\'s; name another folder with --out.'
        )
    if out.exists() and not out.is_dir():
        raise SettingsError(f'"{out}" is a file; name a folder with --out.')
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text('{"made_by": "graftune demo"}\n', encoding="utf-8")


def examples(name: str) -> Path:
    """Returns the folder of an example's data."""
    import graftune

    return Path(str(graftune.__file__)).parent / "examples" / name


def fresh_predictions(adapter: str, data: Path, out: Path) -> list[dict[str, Any]]:
    """Returns a new process's answers to a file of rows.

    Raises:
        TrainingError: The process failed; its last line is given.
    """
    from graftune.errors import TrainingError

    command = [sys.executable, "-c", "from graftune.cli import main; main()"]
    command += ["predict", adapter, "--data", str(data), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"predicting in a new process failed: {last}")
    return read_lines(out)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _run_helpdesk(out: Path, *, as_json: bool, quiet: bool) -> None:
    began = time.monotonic()
    results = _train_all(out, quiet)
    lora = results[1]
    check = _check_fresh(lora, out, quiet)
    from graftune.compare.report import write_report

    page = write_report(results, out / "report.html")
    found = {
        "runs": [result.to_dict() for result in results],
        "fresh_process": check,
        "report": str(page),
        "seconds": time.monotonic() - began,
    }
    _show(results, found, as_json)


def _train_all(out: Path, quiet: bool) -> list[RunResult]:
    from graftune.cli.progress import watcher
    from graftune.tasks.run import linear_probe, train

    results: list[RunResult] = []
    for folder, name, changes in RUNS:
        watch = watcher(quiet=quiet)
        watch.on_note(f"[{len(results) + 1}/{len(RUNS)}] {name}")
        settings = _settings(out / folder, changes)
        if folder == "probe":
            result = linear_probe(settings, watch=watch, overwrite=True)
        else:
            result = train(settings, watch=watch, overwrite=True)
        results.append(dataclasses.replace(result, name=name))
    return results


def _settings(out: Path, changes: dict[str, Any]) -> Any:
    from graftune.tasks.settings import RunSettings

    data = examples("helpdesk")
    splits = {split: str(data / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return RunSettings(base="demo:minilm", data=splits, out=str(out), name=out.name, **changes)


def _check_fresh(result: RunResult, out: Path, quiet: bool) -> dict[str, Any]:
    """Returns how a new process's predictions compare with those of the run itself."""
    if not quiet:
        print("loading the adapter in a new process ...", file=sys.stderr, flush=True)
    known = read_lines(Path(result.run_dir) / "predictions.test.jsonl")
    file = out / "predictions.fresh.jsonl"
    fresh = fresh_predictions(result.adapter_path, examples("helpdesk") / "test.jsonl", file)
    pairs = list(zip(known, fresh, strict=True))
    return {
        "rows": len(pairs),
        "same": sum(old["label"] == new["label"] for old, new in pairs),
        "max_score_difference": max(abs(old["score"] - new["score"]) for old, new in pairs),
        "predictions": str(file),
    }


def _show(results: list[RunResult], found: dict[str, Any], as_json: bool) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words

    if as_json:
        screen.print_json(found)
        return
    print()
    comparison_table(results)
    lora, check = results[1], found["fresh_process"]
    print()
    screen.print_pairs(
        [
            ("adapter", f"{lora.adapter_path}: {words.size(lora.adapter_bytes)}, "
                        f"the base model {words.size(lora.base_bytes)}"),
            ("new process", f"{check['same']} of {check['rows']} predictions the same, "
                            f"scores within {check['max_score_difference']:.1g}"),
            ("report", found["report"]),
            ("took", words.duration(found["seconds"])),
            ("next", f'graftune predict {lora.run_dir} "the app says my air is purple"'),
        ]
    )  # fmt: skip


def comparison_table(results: list[RunResult]) -> None:
    """Prints the runs' metrics and costs, one run a line."""
    from graftune.cli import screen
    from graftune.compare.report.comparison import compare

    table = compare([result.to_dict() for result in results])
    screen.print_table(table.columns, table.rows)
