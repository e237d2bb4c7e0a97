"""Seconds and memory of reading a CSV of many rows: `python benchmarks/read_rows.py [ROWS]`."""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from graftune.tasks.classification import Classification
from graftune.tasks.data import load
from graftune.tasks.settings import DataSettings

WORDS = [f"word{number}" for number in range(5000)]


def main(rows: int) -> None:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with path.open("w") as file:
            file.write("text,label\n")
            for row in range(rows):
                file.write(f"{' '.join(draw.choices(WORDS, k=15))},label{row % 20}\n")
        before, began = _peak_mib(), time.process_time()
        load(DataSettings(train=str(path)), Classification())
        seconds, more = time.process_time() - began, _peak_mib() - before
        size = path.stat().st_size / 1e6
        print(f"{rows:,} rows, {size:.0f} MB: {seconds:.1f} s, {more:.0f} MiB more than before")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
