from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftune.errors import DataError
from graftune.tasks import data
from graftune.tasks.classification import Classification
from graftune.tasks.data import Example, Loaded, hold_out, load
from graftune.tasks.settings import DataSettings
from tests.tasks.tiny import mail, write_jsonl


def loaded(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Loaded:
    path = write_jsonl(folder / "train.jsonl", rows)
    return load(DataSettings(train=str(path), **settings), Classification())


def test_missing_splits_are_cut_stratified_and_said(tmp_path: Path) -> None:
    found = loaded(tmp_path, mail(100), test_fraction=0.2, validation_fraction=0.1)
    assert found.report.rows == {"train": 70, "validation": 10, "test": 20}
    assert found.report.labels["test"] == {"delivery": 10, "refund": 10}
    assert "20 of the training rows were held out (seed 0)" in " ".join(found.report.notes)


def test_the_same_seed_gives_the_same_splits_and_another_others(tmp_path: Path) -> None:
    first, again = loaded(tmp_path, mail(60)), loaded(tmp_path, mail(60))
    other = loaded(tmp_path, mail(60), seed=1)
    assert first.splits == again.splits
    assert first.splits != other.splits


def test_a_fraction_of_zero_makes_no_split(tmp_path: Path) -> None:
    found = loaded(tmp_path, mail(20), test_fraction=0, validation_fraction=0)
    assert list(found.splits) == ["train"]


def test_given_splits_are_kept_and_leaks_counted(tmp_path: Path) -> None:
    rows = mail(20)
    test = write_jsonl(tmp_path / "held.jsonl", [{**rows[0], "text": rows[0]["text"].upper()}])
    found = loaded(tmp_path, rows, test=str(test), validation_fraction=0)
    assert found.report.leaks == {"test in train": 1}
    assert "1 of 1 test rows also occur in the train data" in " ".join(found.report.notes)


def test_repetitions_and_contradictions_are_counted_and_said(tmp_path: Path) -> None:
    rows = [*mail(20), {**mail(1)[0]}, {"text": mail(1)[0]["text"], "label": "refund"}]
    found = loaded(tmp_path, rows, test_fraction=0, validation_fraction=0)
    assert (found.report.duplicates["train"], found.report.contradictions) == (2, 1)
    assert "1 training texts occur with different labels." in found.report.notes


@pytest.mark.parametrize("skip_bad", [False, True])
def test_rows_read_a_few_at_a_time_are_those_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad: bool
) -> None:
    rows: list[dict[str, Any]] = list(mail(40))
    if skip_bad:
        rows[7:7] = [{"text": "no label"}]
        rows[20:20] = [{"text": "", "label": "empty"}, {"text": "x", "label": None}]
    whole = loaded(tmp_path, rows, skip_bad=skip_bad)
    monkeypatch.setattr(data, "AT_ONCE", 3)
    parts = loaded(tmp_path, rows, skip_bad=skip_bad)
    assert parts.splits == whole.splits
    assert parts.report == whole.report
    assert sum(parts.report.left_out.get("train", {}).values()) == 3 * skip_bad


def test_a_text_of_three_labels_is_one_contradiction(tmp_path: Path) -> None:
    rows = [{"text": "hello", "label": label} for label in "abca"]
    assert (
        loaded(tmp_path, rows, validation_fraction=0.0, test_fraction=0.0).report.contradictions
        == 1
    )


def test_rows_keep_their_place_through_the_split(tmp_path: Path) -> None:
    found = loaded(tmp_path, mail(20))
    lines = [int(e.where.rpartition(":")[2]) for s in found.splits.values() for e in s]
    assert sorted(lines) == list(range(1, 21))


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The test split is empty"):
        loaded(tmp_path, mail(2))


def test_hashes_change_with_the_content(tmp_path: Path) -> None:
    first, second = loaded(tmp_path, mail(20)), loaded(tmp_path, mail(22))
    assert first.report.hashes.keys() == second.report.hashes.keys()
    assert first.report.hashes != second.report.hashes


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), min_size=1, max_size=60),
    st.floats(0.01, 0.9),
)
def test_parts_are_disjoint_complete_and_in_order(
    rows: list[tuple[int, str]], share: float
) -> None:
    examples = [Example({}, str(key), label, f"row {n}") for n, (key, label) in enumerate(rows)]
    kept, held = hold_out(examples, share, "seed")
    assert Counter(e.where for e in kept + held) == Counter(e.where for e in examples)
    assert not {e.key for e in kept} & {e.key for e in held}
    for part in (kept, held):
        assert [examples.index(e) for e in part] == sorted(examples.index(e) for e in part)
