"""What a mixture of tasks holds, of each kind, and what can't be mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftune.compare.mixture import mixed
from graftune.errors import DataError, SettingsError
from graftune.tasks.data import load
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import find_task
from tests.tasks import tiny


def settings_of(task: str, data: Path, **more: object) -> RunSettings:
    return RunSettings(
        base="demo:minilm", task=task, data=str(data), method={"name": "prompttuning"}, **more
    )


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "mail.jsonl", tiny.mail(60))


def test_each_task_gives_its_training_rows_up_to_the_cap(tmp_path: Path, mail: Path) -> None:
    few = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.mail(20))
    target, source = settings_of("classification", mail), settings_of("classification", few)
    found = mixed(target, {"few": source}, "own", cap=30)
    splits = load(target.data, find_task("classification")).splits
    assert found.counts == {"few": 14, "own": 30}
    trained = {example.fields["text"] for example in splits["train"]}
    assert {row["text"] for row in found.rows["own"]} < trained
    held = [example.fields["text"] for example in splits["validation"]]
    assert [row["text"] for row in found.validation] == held
    assert mixed(target, {"few": source}, "own", cap=30).rows == found.rows


def test_choices_bring_their_own_words_and_share_the_head(tmp_path: Path, mail: Path) -> None:
    words = {"delivery": "late", "refund": "money back"}
    target = settings_of("choices", mail, task_options={"words": words, "losses": ["lm"]})
    listed = [
        {"text": f"what {i}", "text_pair": "is it", "choices": ["yes", "no"], "label": "yes"}
        for i in range(20)
    ]
    source = settings_of("choices", tiny.write_jsonl(tmp_path / "listed.jsonl", listed))
    found = mixed(target, {"listed": source}, "own")
    assert {row["choices"] for row in found.rows["own"]} == {json.dumps([*words.values()])}
    assert {row["label"] for row in found.rows["own"]} == set(words.values())
    assert found.rows["listed"][0]["text"].endswith("\nis it")
    made = found.write(tmp_path / "out")
    assert made.task == "choices"
    assert made.task_options == {"losses": ["lm"]}
    task = find_task("choices", made.task_options)
    splits = load(made.data, task).splits
    assert splits.keys() == {"train", "validation"}
    assert task.labels(splits) == []
    assert {tuple(one.fields["choices"]) for one in splits["train"]} == {
        ("yes", "no"),
        ("late", "money back"),
    }


def test_conversations_are_mixed_as_they_are(tmp_path: Path) -> None:
    lessons = tiny.write_jsonl(tmp_path / "lessons.jsonl", tiny.lessons())
    settings = settings_of("instruct", lessons)
    made = mixed(settings, {"other": settings}, "own").write(tmp_path / "out")
    splits = load(made.data, find_task("instruct")).splits
    own = load(settings.data, find_task("instruct")).splits
    assert len(splits["train"]) == 2 * len(own["train"])
    assert [one.key for one in splits["validation"]] == [one.key for one in own["validation"]]


def test_other_kinds_and_forms_are_refused(tmp_path: Path, mail: Path) -> None:
    target = settings_of("classification", mail)
    with pytest.raises(SettingsError, match='source "x" is of the task choices and the target of'):
        mixed(target, {"x": settings_of("choices", mail)}, "own")
    with pytest.raises(SettingsError, match="target's task is multitask; tasks of these kinds"):
        mixed(settings_of("multitask", mail), {}, "own")
    with pytest.raises(DataError, match=r'data of "x" can\'t be mixed in: .*gone\.jsonl'):
        mixed(target, {"x": settings_of("classification", tmp_path / "gone.jsonl")}, "own")
    pairs = [{**row, "text_pair": "where"} for row in tiny.mail(20)]
    paired = settings_of("classification", tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs))
    with pytest.raises(DataError, match='"x" has pairs of texts and the others single ones'):
        mixed(target, {"x": paired}, "own")
