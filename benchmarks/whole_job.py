"""A whole job in a fresh process: import, load, ten epochs on short texts, save.

The same messages, model, rank, places, batch size, learning rate and epochs on both sides; PEFT's
is written as its documentation does, with the Trainer's defaults for the rest (batches padded to
their longest, in random order). Accuracy on held-out messages is measured afterwards.
"""

from __future__ import annotations

import json
import statistics
import tempfile

from benchmarks import job_data
from benchmarks.measure import ROUNDS, Row, fresh_process, row

OURS, PEER = "benchmarks.job_ours", "benchmarks.job_peft"
LEEWAY = 1.05


def run(rounds: int = ROUNDS) -> list[Row]:
    rounds = min(rounds, 3)  # a round is some two minutes
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    errors: dict[str, list[float]] = {OURS: [], PEER: []}
    for number in range(rounds):
        for job in (OURS, PEER) if number % 2 else (PEER, OURS):
            with tempfile.TemporaryDirectory() as folder:
                output = fresh_process("-m", job, folder, str(number))[1]
            found = json.loads(output.splitlines()[-1])
            seconds[job].append(found["seconds"])
            errors[job].append(1 - found["accuracy"])
    ratios = [ours / peer for ours, peer in zip(seconds[OURS], seconds[PEER], strict=True)]
    spent = statistics.median(seconds[OURS]), statistics.median(seconds[PEER])
    ours, peer = (statistics.mean(errors[job]) for job in (OURS, PEER))
    work = f"{job_data.COUNT} messages, {spent[0]:.0f} s against {spent[1]:.0f} s"
    told = f"mean accuracy {1 - ours:.3f} against {1 - peer:.3f}"
    return [
        row("whole_job", ratios, 0.6, note=work),
        row("whole_job, held-out errors", [ours / peer], LEEWAY, note=told),
    ]
