from pathlib import Path

import pytest

from graftune.errors import SettingsError
from graftune.tasks.settings import RunSettings

MINIMAL = "base: demo:minilm\ndata:\n  train: mail.csv\n"


def settings_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_round_trip_gives_the_same_settings(tmp_path: Path) -> None:
    made = RunSettings(base="b", data={"train": "x.csv"}, method={"name": "lora", "r": 4})
    assert RunSettings.from_yaml(settings_file(tmp_path, made.to_yaml())) == made


def test_method_and_data_may_be_given_as_words() -> None:
    made = RunSettings(base="b", data="x.csv", method="bitfit")
    assert (made.method, made.data.train) == ({"name": "bitfit"}, "x.csv")


def test_run_directory_is_named_after_task_and_method() -> None:
    made = RunSettings(base="b", data="x.csv", method="LoRA")
    assert made.run_dir == Path("runs/classification-lora")


def test_scientific_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = settings_file(tmp_path, MINIMAL + "method: {name: lora, alpha: 1e1}\n")
    assert RunSettings.from_yaml(path).method["alpha"] == 10.0


def test_overrides_replace_values_and_make_sections(tmp_path: Path) -> None:
    path = settings_file(tmp_path, MINIMAL)
    changes = ["train.lr=2e-3", "method.r=4", "data.columns.text=body", "method.name=lora"]
    made = RunSettings.from_yaml(path, changes)
    assert (made.train.lr, made.method["r"], made.data.columns.text) == (2e-3, 4, "body")


def test_replaced_merges_sections_and_replaces_the_method() -> None:
    made = RunSettings(base="b", data="x.csv", method={"name": "lora", "r": 4}, train={"lr": 0.1})
    other = made.replaced(train={"epochs": 2}, method={"name": "full"})
    assert (other.train.lr, other.train.epochs, other.method) == (0.1, 2, {"name": "full"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian: {}\n", 'run.yaml:4: trian: unknown key. Did you mean "train"?'),
        ("train:\n  epoch: 3\n", 'run.yaml:5: train.epoch: unknown key. Did you mean "epochs"?'),
        ("train:\n  schedule: linaer\n", "found 'linaer'. Did you mean \"linear\"?"),
        ("train:\n  lr: -1\n", "run.yaml:5: train.lr: input should be greater than 0, found -1."),
        ("train: {epochs: 1, steps: 2}\n", "epochs=1 and steps=2: give one of the two."),
        ("train: 3\n", "train: expected keys and values below it, found 3."),
        ("method: {r: 8}\n", "method: needs a name"),
        ("name: a/b\n", '"a/b" is no name'),
        ("base: other\n", "run.yaml:4: base is given twice, first on line 1."),
        ("train: [1\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_place_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        RunSettings.from_yaml(settings_file(tmp_path, MINIMAL + text))
    assert said in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data: missing\."):
        RunSettings.from_yaml(settings_file(tmp_path, "base: b\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r'There is no settings file ".*none\.yaml"'):
        RunSettings.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.lrr=1", '--set: train.lrr: unknown key. Did you mean "lr"?'),
        ("train.lr", "not of the form key=value"),
        ("base.x=1", "base has no keys"),
    ],
)
def test_a_wrong_override_is_refused(change: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        RunSettings(base="b", data="x.csv").with_overrides([change])
    assert said in str(caught.value)


def test_keyword_arguments_are_checked_alike() -> None:
    with pytest.raises(SettingsError, match=r'nam: unknown key\. Did you mean "name"'):
        RunSettings(base="b", data="x.csv", nam="y")


def test_schema_describes_every_section() -> None:
    schema = RunSettings.json_schema()
    sections = {
        "base",
        "task",
        "task_options",
        "data",
        "method",
        "beside",
        "start",
        "train",
        "out",
        "name",
    }
    assert sections == schema["properties"].keys()
    assert "Learning rate" in schema["$defs"]["TrainSettings"]["properties"]["lr"]["description"]
