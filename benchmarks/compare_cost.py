"""`graftune compare` over 12 methods beside the same 12 runs as `graftune train` commands.

The demo's messages and MiniLM, one seed, no search of learning rates: both sides do the same runs,
with the same numbers. What a comparison saves is what every run needs again (imports, data, base,
tokens, a head's start), so that longer runs save a smaller share.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, ROUNDS, Row, fresh_process, row

METHODS = (
    *("bitfit", "ia3", "lora", "loha", "lokr", "vera", "layernormtuning", "houlsbyadapter"),
    *("pfeifferadapter", "compacter", "adapterplus", "laddersidetuning"),
)
STEPS = 20
DATA = ROOT / "src" / "graftune" / "examples" / "helpdesk"
CALL = ("-c", "from graftune.cli import main; main()")


def run(rounds: int = ROUNDS) -> list[Row]:
    ratios: list[float] = []
    spent: list[tuple[float, float]] = []
    for _ in range(min(rounds, 3)):  # a round is some minutes
        with tempfile.TemporaryDirectory() as folder:
            ours, peer = _compared(Path(folder)), _single(Path(folder))
        ratios.append(ours / peer)
        spent.append((ours, peer))
    ours, peer = sorted(spent)[len(spent) // 2]
    note = f"{len(METHODS)} methods of {STEPS} steps, CPU seconds {ours:.0f} against {peer:.0f}"
    return [row("compare / the same runs of train", ratios, 0.6, unit="× train", note=note)]


def _compared(folder: Path) -> float:
    words = ["compare", *_shared(), "--method", ",".join(METHODS), "--seeds", "1"]
    words += ["--search", "off", "--budget", f"steps={STEPS}", "--out", str(folder / "compare")]
    seconds, output = fresh_process(*CALL, *words, "--json", "--quiet")
    bad = [one["label"] for one in json.loads(output)["methods"] if one["status"] != "done"]
    if bad:
        raise RuntimeError(f"not done: {', '.join(bad)}")
    return seconds


def _single(folder: Path) -> float:
    total = 0.0
    for method in METHODS:
        words = ["train", *_shared(), "--method", method, "--steps", str(STEPS), "--no-report"]
        total += fresh_process(*CALL, *words, "--quiet", "--out", str(folder / method))[0]
    return total


def _shared() -> list[str]:
    splits = {name: str(DATA / f"{name}.jsonl") for name in ("train", "validation", "test")}
    data = [word for name, path in splits.items() for word in (f"--{name}", path)]
    return ["--base", "demo:minilm", *data]
