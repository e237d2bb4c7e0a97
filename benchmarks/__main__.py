"""Runs the benchmarks named, or all, and prints one table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import time
from pathlib import Path

from benchmarks.measure import ROOT, ROUNDS, Row, single_thread

NAMES = (
    "import_time",
    "lora_call",
    "lora_step",
    "backward_cut",
    "adapter_drop",
    "adapterhub",
    "load_100",
    "whole_job",
    "training_memory",
    "trunk_cache",
    "plan",
    "compare_cost",
)
PAGE = ROOT / "docs" / "benchmarks.md"
KEPT = ROOT / "benchmarks" / "results.json"
"""Every line of the page with its date, so that some can be measured again alone."""


def main() -> None:
    options = _options()
    os.environ.update(single_thread())
    rows: list[Row] = []
    began = time.monotonic()
    for name in options.names or NAMES:
        print(f"{name} …", flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        _one_thread()
        for found in module.run(options.rounds):
            print("  " + _line(found), flush=True)
            rows.append(found)
        if options.write:  # after each, so that a run cut short leaves what it measured
            PAGE.write_text(page(_kept(rows)))
    print("\n" + table(rows))
    print(f"\n{_machine()}; {time.monotonic() - began:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps([found.to_dict() for found in rows], indent=2))


def _kept(rows: list[Row]) -> list[Row]:
    """Returns all lines of the page; those measured now replace old ones, on disk too."""
    old = json.loads(KEPT.read_text()) if KEPT.exists() else []
    found = {line["name"]: Row(**line) for line in old}
    today = time.strftime("%Y-%m-%d")
    found |= {line.name: dataclasses.replace(line, date=today) for line in rows}
    lines = [dataclasses.asdict(line) for line in found.values()]
    KEPT.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
    return list(found.values())


def table(rows: list[Row]) -> str:
    """Returns the results as a table in Markdown."""
    head = ("what", "median", "least … largest", "target", "met", "date", "remarks")
    body = [
        (
            found.name,
            f"{found.value:.2f} {found.unit}",
            f"{found.low:.2f} … {found.high:.2f}",
            f"≤ {found.target:g} {found.unit}",
            "yes" if found.is_met else "no",
            found.date or "now",
            found.note,
        )
        for found in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *body]
    padded = [[c.ljust(width) for c, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def page(rows: list[Row]) -> str:
    """Returns docs/benchmarks.md."""
    return f"""# Benchmarks

What graftune costs beside other libraries, and parts of it beside the whole, as `make bench`
(`python -m benchmarks --write`) measured it: CPU seconds of one thread, user and system; both sides
take turns within each round; a ratio is the median over rounds.

{table(rows)}

{_machine()}.
"""


def _line(found: Row) -> str:
    spread = f"[{found.low:.2f} … {found.high:.2f}]"
    mark = "met" if found.is_met else "MISSED"
    target = f"target ≤ {found.target:g}: {mark}"
    return f"{found.name}: {found.value:.2f} {found.unit} {spread}, {target}; {found.note}"


def _machine() -> str:
    from importlib.metadata import version

    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    python = f"Python {platform.python_version()}"
    return f"{python}, {versions}, {os.cpu_count()} CPUs ({platform.machine()}), one thread"


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least one; more is surer")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
    return options


if __name__ == "__main__":
    main()
