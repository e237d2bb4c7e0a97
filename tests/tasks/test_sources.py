from pathlib import Path

import pytest

from graftune.errors import DataError
from graftune.tasks.sources import file_hashes, read_source, read_split
from tests.tasks.tiny import mail, write_jsonl


def test_a_folder_gives_its_splits_by_their_usual_names(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "test-2024.jsonl"):
        write_jsonl(tmp_path / name, mail(4))
    (tmp_path / "README.md").write_text("about")
    assert sorted(read_source(str(tmp_path))) == ["test", "train", "validation"]


def test_a_folder_of_one_file_is_the_training_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "anything.jsonl", mail(4))
    assert len(read_source(str(tmp_path))["train"].rows) == 4


def test_a_saved_dataset_gives_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the folder is written by datasets")
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    made = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    datasets.DatasetDict({"train": made, "dev": made}).save_to_disk(str(tmp_path / "d"))
    found = read_source(str(tmp_path / "d"))
    assert found["validation"].rows == [{"text": "a", "label": "yes"}]


def test_a_file_serves_as_any_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "held-out.jsonl", mail(4))
    assert len(read_split(str(path), "test").rows) == 4


def test_hashes_name_every_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", mail(4))
    assert file_hashes(str(path)) == file_hashes(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{}/tran.jsonl", 'Did you mean "train.jsonl"?'),
        ("{}", "holds a.jsonl, b.jsonl: expected one data file, or one named train"),
        ("surely/not-a-data-set-of-the-hub", "is neither a file nor a folder here"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, spec: str, said: str) -> None:
    if spec == "{}":
        write_jsonl(tmp_path / "a.jsonl", mail(2))
        write_jsonl(tmp_path / "b.jsonl", mail(2))
    else:
        write_jsonl(tmp_path / "train.jsonl", mail(2))
    with pytest.raises(DataError) as caught:
        read_source(spec.format(tmp_path))
    assert said in str(caught.value)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / name, mail(2))
    with pytest.raises(DataError, match="holds no validation split: found train, test"):
        read_split(str(tmp_path), "validation")
