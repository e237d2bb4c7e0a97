"""Methods compared on public data sets, MiniLM as the base: the figures of docs/comparisons.md.

Not among the ratios of `python -m benchmarks`: it takes hours, and data that the project does not
hold. `python -m benchmarks.comparisons --data FOLDER --out FOLDER [NAMES]` does the runs that are
missing; `--write` makes the page's tables of what is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

MANY = (
    *("probe", "full", "bitfit", "pfeifferadapter", "houlsbyadapter", "lora", "adalora", "loha"),
    *("ia3", "prefixtuning", "prompttuning", "mam", "unipelt", "laddersidetuning"),
)
FEW = ("full", "bitfit", "pfeifferadapter", "lora")

COMPARISONS: dict[str, dict[str, Any]] = {
    "banking77-10shot": {
        "data": {"train": "banking77/train_10shot.jsonl", "test": "banking77/test.jsonl"},
        "methods": MANY,
        "seeds": 3,
        "steps": 200,
    },
    "snips-small": {
        "data": {"train": "snips/train_small.jsonl", "test": "snips/test.jsonl"},
        "methods": MANY,
        "seeds": 3,
        "steps": 150,
    },
    "sentiment": {
        "data": {"train": "sentiment_sentences/train.jsonl"}
        | {"test": "sentiment_sentences/test.jsonl"},
        "methods": FEW,
        "steps": 300,
    },
    "wnut17": {
        "task": "labelling",
        "data": {"train": "wnut17/train.jsonl", "validation": "wnut17/dev.jsonl"}
        | {"test": "wnut17/test.jsonl"},
        "methods": FEW,
        "steps": 300,
    },
    "snli": {
        "data": {"train": "snli/train.jsonl", "test": "snli/test.jsonl"},
        "methods": FEW,
        "steps": 300,
    },
    "xquad-en": {
        "task": "spans",
        "data": {"train": "xquad/train_en.jsonl", "test": "xquad/test_en.jsonl"},
        "methods": FEW,
        "steps": 100,
    },
    "banking77": {
        "data": {"train": "banking77/train.jsonl", "test": "banking77/test.jsonl"},
        "methods": FEW,
        "steps": 600,
    },
}
"""Per name: task, files, methods, steps of each run; everything else is the command's default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(COMPARISONS))
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--out", required=True, type=Path, help="folder of the comparisons")
    options = parser.parse_args()
    unknown = set(options.names) - set(COMPARISONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(COMPARISONS)}")
    for name in options.names or COMPARISONS:
        words = command(name, options.data, options.out)
        print(" ".join(words), flush=True)
        subprocess.run(
            [sys.executable, "-c", "from graftune.cli import main; main()", *words], check=True
        )


def command(name: str, data: Path, out: Path) -> list[str]:
    """Returns the words of one comparison's `graftune` command."""
    told = COMPARISONS[name]
    words = ["compare", "--base", "demo:minilm", "--task", told.get("task", "classification")]
    for split, path in told["data"].items():
        words += [f"--{split}", str(data / path)]
    words += ["--method", ",".join(told["methods"]), "--seeds", str(told.get("seeds", 1))]
    return [*words, "--budget", f"steps={told['steps']}", "--out", str(out / name)]


if __name__ == "__main__":
    main()
