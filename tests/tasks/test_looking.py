"""What `look` finds: each oddity that is put into the data is said, and clean data is quiet."""

from pathlib import Path
from typing import Any

import pytest

from graftune.errors import DataError
from graftune.tasks.looking import Look, histogram, look
from graftune.tasks.settings import RunSettings
from tests.tasks.tiny import bert, lessons, llama, mail, passages, tagged, write_jsonl


def looked(
    folder: Path, rows: list[dict[str, Any]], task: str | None = None, base: str = "", **data: Any
) -> Look:
    path = write_jsonl(folder / "rows.jsonl", rows)
    settings = RunSettings(base=base or "none", data={"train": str(path), **data})
    return look(settings, task=task, with_base=bool(base))


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        (mail(20), "classification"),
        (tagged(20), "labelling"),
        (passages(20), "spans"),
        (lessons(20), "instruct"),
        (
            [{"messages": [{"role": "assistant", "content": f"a{n}"}]} for n in range(20)],
            "instruct",
        ),
        ([{"text": f"t{n}", "choices": ["x", "y"], "label": 1} for n in range(20)], "choices"),
    ],
)
def test_the_task_is_told_from_the_rows(tmp_path: Path, rows: Any, task: str) -> None:
    found = looked(tmp_path, rows)
    assert (found.task, found.guessed) == (task, True)
    assert task not in found.other_tasks


def test_other_tasks_that_could_use_the_rows_are_named(tmp_path: Path) -> None:
    rows = [{"question": f"q {n}", "answer": "a", "label": str(n % 2)} for n in range(20)]
    found = looked(tmp_path, rows)
    assert found.task == "instruct"
    assert found.other_tasks["classification"] == {"text": "question", "label": "label"}


def test_rows_of_no_task_are_refused_with_what_each_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)labelling: .*spans: .*classification: "):
        looked(tmp_path, [{"x": 1}, {"x": 2}])


def test_columns_are_described_and_what_they_could_be(tmp_path: Path) -> None:
    rows = [{**row, "kind": "ab"[n % 2], "about": f"so {n}"} for n, row in enumerate(mail(20))]
    found = {one["column"]: one for one in looked(tmp_path, rows).columns}
    assert (found["text"]["role"], found["label"]["role"]) == ("text", "label")
    assert found["kind"]["could_be"] == ["label"]
    assert "text" in found["about"]["could_be"]
    assert found["kind"]["distinct"] == 2


def test_bad_rows_are_all_counted_and_are_problems_unless_they_are_skipped(tmp_path: Path) -> None:
    rows = [*mail(40), {"text": "", "label": "refund"}, {"text": "x"}]
    found = looked(tmp_path, rows)
    assert sum(found.data.left_out["train"].values()) == 2
    assert found.problems == ["2 train rows can't be used; data.skip_bad: true leaves them out."]
    assert looked(tmp_path, rows, skip_bad=True).problems == []


def test_clean_rows_have_no_problems_and_no_pairs(tmp_path: Path) -> None:
    found = looked(tmp_path, mail(60))
    assert (found.problems, found.pairs, found.rare) == ([], [], [])
    assert sum(found.data.rows.values()) == 60


def test_leaks_and_contradictions_are_named_with_both_places(tmp_path: Path) -> None:
    first, second, *_ = mail(20)
    test = write_jsonl(
        tmp_path / "test.jsonl", [{"text": first["text"], "label": "refund"}, second]
    )
    found = looked(tmp_path, mail(20), test=str(test), validation_fraction=0)
    assert found.data.leaks == {"test in train": 2}
    both = f"{tmp_path}/rows.jsonl:1 = {tmp_path}/test.jsonl:1 (labels"
    assert found.pairs[0].startswith(both)
    assert found.pairs[1].endswith("(in train and test)")


def test_rare_and_uneven_labels_are_said(tmp_path: Path) -> None:
    rows = [*mail(60), {"text": "x", "label": "once"}]
    found = looked(tmp_path, rows, test_fraction=0, validation_fraction=0)
    assert found.rare == ["once"]
    assert any('"once" 1: accuracy says little' in note for note in found.notes)


def test_what_training_refuses_is_a_problem_and_the_rest_is_still_shown(tmp_path: Path) -> None:
    one = looked(tmp_path, mail(1))
    assert any("split is empty" in said for said in one.problems)
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": "unseen"}])
    found = looked(tmp_path, mail(20), test=str(test), base=str(bert(tmp_path / "bert")))
    assert any('"unseen" never occurs' in said for said in found.problems)
    assert found.percentiles["test"]["max"] == 3


def test_lengths_are_those_that_training_reports(tmp_path: Path) -> None:
    found = looked(tmp_path, mail(60), base=str(bert(tmp_path / "bert")), max_length=5)
    assert found.data.max_length == 5
    assert found.percentiles["train"]["max"] == found.data.lengths["train"]["max"] == 6
    assert found.data.cut == found.data.rows
    assert sum(bar["rows"] for bar in found.histogram) == found.data.rows["train"]


def test_answers_cut_before_their_end_are_said(tmp_path: Path) -> None:
    base = str(llama(tmp_path / "llama"))
    whole = looked(tmp_path, lessons(), base=base)
    assert whole.trained["unended"] == 0
    assert 0.1 < whole.trained["share"] < 0.9
    cut = looked(tmp_path, lessons(), base=base, max_length=5)
    assert cut.trained["unended"] == cut.data.rows["train"]
    assert any("no end token" in note for note in cut.notes)


def test_spans_without_their_answer_and_entities_without_a_beginning_are_said(
    tmp_path: Path,
) -> None:
    spans = passages(20)
    spans[3]["answers"] = ["nowhere"]
    assert any("don't hold their answer" in note for note in looked(tmp_path, spans).notes)
    words = tagged(40)
    words[0]["ner_tags"] = ["O", "I-thing", *words[0]["ner_tags"][2:]]
    found = looked(tmp_path, words, test_fraction=0, validation_fraction=0)
    assert any("begin with I- and not with B-" in note for note in found.notes)
    assert found.entities["thing"] == 40


def test_a_histogram_holds_every_length_once() -> None:
    lengths = [3, 3, 4, 9, 27, 100]
    bars = histogram(lengths)
    assert sum(bar["rows"] for bar in bars) == len(lengths)
    assert all(
        bar["rows"] == sum(bar["from"] <= one <= bar["to"] for one in lengths) for bar in bars
    )
    assert histogram([5]) == [{"from": 5, "to": 5, "rows": 1}]
