"""A comparison whose processes are all killed goes on, and no number shows that they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graftune.compare.results import FILE
from graftune.tasks.workspace import PREDICTIONS
from tests.tasks import tiny

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
TIMES = ("seconds", "_per_second", "runtime", "memory_bytes")
"""What two runs may differ in, told by its name's end."""
PLACES = ("run_dir", "adapter_path", "out", "run_dirs", "key", "report", "recommendation")
"""Where things lie; and which method is cheapest, which goes by times."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killing")
    tiny.bert(folder / "base")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    return folder


def begun(place: Path, out: str) -> subprocess.Popen[str]:
    """Starts a comparison, in a group of processes of its own."""
    command = [sys.executable, "-c", "from graftune.cli import main; main()", "compare"]
    command += ["--base", str(place / "base"), "--data", str(place / "mail.jsonl")]
    command += ["--method", "bitfit", "--method", "lora:r=2,targets=qv", "--seeds", "2"]
    command += ["--budget", "steps=6", "--search", "1,10", "--out", str(place / out), "--json"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(place: Path, out: str) -> dict[str, Any]:
    """Returns what a comparison finds that is left in peace."""
    process = begun(place, out)
    told, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    return json.loads(told)


def kill_after(place: Path, out: str, count: int) -> int:
    """Starts a comparison, kills all of it after so many results; returns how many it has."""
    process, results = begun(place, out), place / out / FILE
    until = time.monotonic() + TIMEOUT_S
    while not results.exists() or results.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    return results.read_bytes().count(b"\n")


def numbers(found: Any) -> Any:
    """Returns what must be the same of two comparisons: all but times, memory and places."""
    if isinstance(found, list):
        return [numbers(one) for one in found]
    if not isinstance(found, dict):
        return found
    return {
        key: numbers(value)
        for key, value in found.items()
        if key not in PLACES and not key.endswith(TIMES)
    }


def records(place: Path, out: str) -> dict[Any, Any]:
    """Returns every finished run, with the answers to its test rows."""
    found: dict[Any, Any] = {}
    for line in (place / out / FILE).read_text().splitlines():
        record = json.loads(line)
        answers = Path(record["result"]["run_dir"]) / PREDICTIONS
        told = answers.read_text() if answers.exists() else ""
        which = record["label"], record["seed"], record["multiple"]
        assert which not in found
        found[which] = numbers(record), told
    return found


@pytest.fixture(scope="module")
def calm(place: Path) -> dict[str, Any]:
    """What the comparison finds that nothing disturbs."""
    return ended(place, "calm")


@pytest.mark.slow
def test_killed_comparisons_end_with_the_numbers_of_undisturbed_ones(
    place: Path, calm: dict[str, Any]
) -> None:
    assert 1 <= kill_after(place, "dead", 1) < 8
    assert 5 <= kill_after(place, "dead", 5) < 8
    again = ended(place, "dead")
    assert [one["status"] for one in again["methods"]] == ["done", "done"]
    assert len(again["standings"]) == 2
    assert numbers(again) == numbers(calm)
    kept = records(place, "dead")
    assert len(kept) == 8
    assert kept == records(place, "calm")


@pytest.mark.slow
def test_the_same_command_in_two_folders_finds_the_same_numbers(
    place: Path, calm: dict[str, Any]
) -> None:
    assert numbers(ended(place, "twin")) == numbers(calm)
    assert records(place, "twin") == records(place, "calm")
