"""`graftune demo --chat`: a small chat model before and after it learns a house style."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.cli.demo import examples, read_lines

if TYPE_CHECKING:
    from graftune.tasks.result import RunResult

STEPS, BATCH_SIZE, ANSWER_TOKENS = 12, 8, 96
SHOWN = 3
"""Questions whose answers are printed before and after."""


def run_chat(out: Path, *, as_json: bool, quiet: bool) -> None:
    """Answers the test questions with the base, trains LoRA, answers them again, compares."""
    from graftune.cli.progress import watcher
    from graftune.tasks.run import train

    began = time.monotonic()
    settings = _settings(out / "chat")
    watch = watcher(quiet=quiet)
    result = train(settings, watch=watch, overwrite=True)
    rows = read_lines(examples("housestyle") / "test.jsonl")
    questions = [{"instruction": row["instruction"]} for row in rows]
    before = _answers(result, questions, "the base", base_only=True, quiet=quiet)
    after = _answers(result, questions, "the adapter", base_only=False, quiet=quiet)
    samples = [
        {**row, "before": old, "answer": new, "expected": row["answer"]}
        for row, old, new in zip(rows, before, after, strict=True)
    ]
    _show(result, samples, out, time.monotonic() - began, as_json)


def in_style(answers: list[str]) -> float:
    """Returns the share of answers that pass every check of the house style."""
    from graftune.examples.housestyle import is_house_style

    return sum(all(is_house_style(text).values()) for text in answers) / max(len(answers), 1)


def _settings(out: Path) -> Any:
    from graftune.tasks.settings import RunSettings

    folder = examples("housestyle")
    return RunSettings(
        base="demo:smollm2",
        task="instruct",
        data={"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"),
              "validation_fraction": 0.0},
        method={"name": "lora", "r": 8, "alpha": 16.0},
        train={"steps": STEPS, "batch_size": BATCH_SIZE, "lr": 2e-3},
        out=str(out),
        name=out.name,
    )  # fmt: skip


def _answers(
    result: RunResult, questions: list[dict[str, Any]], who: str, *, base_only: bool, quiet: bool
) -> list[str]:
    from graftune.tasks.run import predict

    if not quiet:
        print(f"{who} answers {len(questions)} questions ...", file=sys.stderr, flush=True)
    found = predict(result.run_dir, questions, base_only=base_only, max_new_tokens=ANSWER_TOKENS)
    return [str(one["answer"]) for one in found]


def _show(
    result: RunResult, samples: list[dict[str, Any]], out: Path, seconds: float, as_json: bool
) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words, write_report

    before = in_style([sample["before"] for sample in samples])
    after = in_style([sample["answer"] for sample in samples])
    metrics = {**result.metrics, "test": {**result.metrics.get("test", {}), "house_style": after}}
    run = dataclasses.replace(result, name="house style", metrics=metrics).to_dict()
    page = write_report({**run, "predictions": samples}, out / "report-chat.html")
    found = {"before": before, "after": after, "samples": samples, "report": str(page),
             "seconds": seconds, "run": run}  # fmt: skip
    if as_json:
        screen.print_json(found)
        return
    for sample in samples[:SHOWN]:
        print(f"\n> {sample['instruction']}\n  before: {_one_line(sample['before'])}")
        print(f"  after:  {_one_line(sample['answer'])}")
    print()
    screen.print_pairs(
        [
            ("in house style", f"{words.percent(before)} of {len(samples)} test answers before, "
                               f"{words.percent(after)} after {STEPS} steps of {BATCH_SIZE}"),
            ("adapter", f"{result.adapter_path}: {words.size(result.adapter_bytes)}, "
                        f"the base model {words.size(result.base_bytes)}"),
            ("report", str(page)),
            ("took", words.duration(seconds)),
            ("next", f'graftune predict {result.run_dir} "How do I boil an egg?"'),
        ]
    )  # fmt: skip


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 220 else flat[:219] + "…"
