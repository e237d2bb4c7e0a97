"""The file of finished runs: whole lines count, a torn one doesn't."""

from __future__ import annotations

from pathlib import Path

from graftune.compare.results import FILE, Record, Results
from graftune.tasks.workspace import PREDICTIONS, write_lines, write_scores


def record(key: str, **more: object) -> Record:
    return Record(**{"key": key, "label": "lora", "seed": 0, "status": "done", **more})


def test_records_are_found_again_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(record("a", status="failed", why="it was late"))
    results.add(record("b"))
    results.add(record("a", lr=0.1))
    for found in (results, Results(tmp_path)):
        assert found.get("a") == record("a", lr=0.1)
        assert found.get("b") == record("b")
        assert found.get("c") is None


def test_a_torn_last_line_is_passed_over_and_the_next_is_whole(tmp_path: Path) -> None:
    Results(tmp_path).add(record("a"))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": "b", "lab')
    again = Results(tmp_path)
    assert again.get("a") is not None
    assert again.get("b") is None
    again.add(record("b"))
    assert Results(tmp_path).get("b") == record("b")


def test_rows_scores_are_read_and_older_runs_have_right_and_wrong(tmp_path: Path) -> None:
    write_lines(tmp_path / PREDICTIONS, [{"label": "a", "true": "a"}, {"label": "a", "true": "b"}])
    done = record("a", result={"run_dir": str(tmp_path)})
    assert done.scores == [1.0, 0.0]
    write_scores(tmp_path, [0.25, 0.5])
    assert done.scores == [0.25, 0.5]
    assert record("b", result={"run_dir": str(tmp_path / "gone")}).scores == []
    assert record("c").scores == []
