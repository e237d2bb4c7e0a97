"""A made-up comparison, shaped like a real one, for its report and its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftune.compare.outcome import Comparison, MemberOutcome
from graftune.compare.results import Record
from graftune.compare.settings import CompareSettings
from graftune.compare.statistics import standings
from graftune.tasks.workspace import PREDICTIONS, write_lines
from tests.compare.results import predictions, result

SHARES = {
    "probe": (0.80,),
    "BitFit": (0.90, 0.905, 0.91),
    "LoRA": (0.91, 0.92, 0.915),
    "full": (0.93, 0.92, 0.925),
}
COSTS = {
    "probe": (5_000, 50_000_000, 2.0),
    "BitFit": (30_000, 300_000_000, 30.0),
    "LoRA": (300_000, 400_000_000, 40.0),
    "full": (22_000_000, 700_000_000, 60.0),
}


def record(label: str, seed: int, share: float, folder: Path, **more: Any) -> Record:
    """A run that is done, its predictions in a folder of its own."""
    trained, memory, seconds = COSTS[label]
    run_dir = folder / "runs" / f"{label}-seed{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    found = result(label, share, run_dir=str(run_dir), costs={"start_seconds": seconds}).to_dict()
    found["parameters"] |= {"trainable": trained, "share": trained / 22_713_216}
    if label == "LoRA":
        found["heat_maps"] = [
            {"title": "Ranks", "rows": ["query"], "columns": ["0", "1"], "values": [[8, 4]]}
        ]
    write_lines(run_dir / PREDICTIONS, predictions(found["confusion"], found["labels"]))
    values = {"key": f"{label}{seed}", "label": label, "seed": seed, "status": "done"}
    values |= {"memory_bytes": memory, "seconds": seconds + 5, "result": found}
    return Record(**{**values, **more})


def comparison(
    folder: Path, shares: Mapping[str, Sequence[float]] = SHARES, **more: Any
) -> Comparison:
    """A comparison in a folder; a member called "lost" failed, and "big" was left out."""
    members: list[MemberOutcome] = []
    for label, given in shares.items():
        runs = tuple(record(label, seed, one, folder) for seed, one in enumerate(given))
        tried = (1.0, 3.0) if label != "probe" else ()
        trials = tuple(
            record(label, 0, given[0] - one / 100, folder, multiple=one, lr=one / 1000)
            for one in tried
        )
        members.append(MemberOutcome(label, "adapter" if tried else "probe", trials, runs))
    for label, status in (("lost", "failed"), ("big", "left out")):
        why = "its process was ended by SIGKILL"
        members.append(MemberOutcome(label, "adapter", (), (), status=status, why=why))
    values = {one.label: one.values("accuracy") for one in members if one.done}
    scores = {one.label: [run.scores for run in one.done] for one in members if one.done}
    told = standings(values, scores, is_share=True, is_of_rows=True)
    given_settings = CompareSettings(
        base="demo:minilm", data="mail.csv", methods=[*shares, "lost", "big"], out=str(folder)
    )
    found = {
        "settings": given_settings, "metric": "accuracy", "split": "test", "rows": 270,
        "members": tuple(members), "standings": tuple(told), "steps": {}, "seconds": 100.0,
    }  # fmt: skip
    return Comparison(**{**found, **more})
