"""The file of finished runs: whole lines count, a torn one doesn't."""

from __future__ import annotations

from pathlib import Path

from graftune.compare.results import FILE, Record, Results


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
