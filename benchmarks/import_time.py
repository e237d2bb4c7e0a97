"""`import graftune` and `graftune --help`, whole processes, beside `import peft`."""

from __future__ import annotations

from benchmarks.measure import ROUNDS, Row, fresh_process, row

IMPORT = ("-c", "import graftune")
HELP = (
    "-c",
    "import sys; sys.argv = ['graftune', '--help']; from graftune.cli import main; main()",
)
PEER = ("-c", "import peft")


def run(rounds: int = ROUNDS) -> list[Row]:
    found: dict[str, list[float]] = {"import": [], "help": [], "peft": []}
    for command in (IMPORT, HELP, PEER):
        fresh_process(*command)
    for _ in range(rounds):
        for name, command in (("import", IMPORT), ("help", HELP), ("peft", PEER)):
            found[name].append(fresh_process(*command)[0])
    ratios = [ours / peer for ours, peer in zip(found["import"], found["peft"], strict=True)]
    return [
        row("import graftune", found["import"], 0.15, unit="s", note="whole process"),
        row("graftune --help", found["help"], 0.4, unit="s", note="whole process"),
        row("import graftune / import peft", ratios, 0.35, note="whole processes"),
    ]
