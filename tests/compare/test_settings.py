"""What a comparison may be told, and how what can't be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftune.compare.members import members_of, run_settings
from graftune.compare.settings import CompareSettings
from graftune.errors import SettingsError


def settings(**more: object) -> CompareSettings:
    return CompareSettings(**{"base": "demo:minilm", "data": "mail.csv", **more})


def test_methods_are_names_or_have_settings_and_training_of_their_own() -> None:
    found = settings(
        methods=[
            "lora",
            {"name": "BitFit", "label": "biases", "train": {"lr": 0.1}, "heads": False},
        ],
        train={"batch_size": 4},
        seeds=2,
        budget={"steps": 7},
    )
    lora, biases = members_of(found)
    assert (lora.label, biases.label, biases.seeds) == ("lora", "biases", (0, 1))
    one = run_settings(found, biases, 1)
    assert one.method == {"name": "BitFit", "heads": False}
    assert (one.train.lr, one.train.steps, one.train.batch_size, one.train.seed) == (0.1, 7, 4, 1)
    assert str(one.run_dir) == "runs/classification-compare/runs/biases-seed1"


def test_baselines_go_by_their_names_and_run_once_where_nothing_is_drawn() -> None:
    found = members_of(settings(methods=["probe", "full", "in-context", "hard-prompt"], seeds=3))
    assert [one.kind for one in found] == ["probe", "adapter", "in-context", "in-context"]
    assert [len(one.seeds) for one in found] == [1, 3, 3, 1]
    assert found[1].method == {"name": "FullFineTuning"}
    assert found[3].method == {"name": "in-context", "shots": 0}


def test_the_same_method_twice_is_told_apart_by_its_settings() -> None:
    two = settings(methods=[{"name": "lora", "r": 2}, {"name": "lora", "r": 8}])
    assert [one.label for one in members_of(two)] == ["lora r=2", "lora r=8"]
    with pytest.raises(SettingsError, match='two are called "lora"'):
        members_of(settings(methods=["lora", "lora"]))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"method": ["lora"]}, 'unknown key. Did you mean "methods"'),
        ({"budget": {"step": 3}}, 'budget.step: unknown key. Did you mean "steps"'),
        ({"budget": {"steps": 3, "epochs": 1}}, "give one budget, found steps and epochs"),
        ({"budget": {"memory": "much"}}, 'expected bytes, as in "2 GB"'),
        ({"budget": {"steps": 3}, "train": {"steps": 3}}, "train.steps and budget.steps"),
        ({"seeds": [1, 1]}, "expected different seeds"),
        ({"seeds": 0}, "expected one seed or more"),
        ({"train": {"seed": 3}}, "a comparison has seeds"),
        ({"trial": 0}, "greater than 0"),
        ({"methods": []}, "methods"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError, match=told.replace("[", r"\[").replace("(", r"\(")):
        settings(**more)


def test_a_members_training_is_checked_too() -> None:
    wrong = settings(methods=[{"name": "lora", "train": {"leraning": 1}}])
    with pytest.raises(SettingsError, match=r"methods, lora: train.leraning: unknown key"):
        members_of(wrong)
    both = settings(methods=[{"name": "lora", "train": {"steps": 1}}], budget={"steps": 7})
    with pytest.raises(SettingsError, match=r"train.steps is 1, but the budget is steps = 7"):
        members_of(both)


def test_a_file_says_the_line_and_its_own_yaml_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("base: demo:minilm\ndata: mail.csv\nsedes: 3\n")
    with pytest.raises(SettingsError, match=r'compare.yaml:3: sedes.*Did you mean "seeds"'):
        CompareSettings.from_yaml(path)
    given = settings(methods=["probe", {"name": "lora", "r": 2}], budget={"memory": "2 GB"})
    path.write_text(given.to_yaml())
    assert CompareSettings.from_yaml(path) == given
    assert CompareSettings.from_yaml(path, ["seeds=5"]).seeds == (0, 1, 2, 3, 4)
    assert given.budget.memory == 2_000_000_000
    assert "methods" in CompareSettings.json_schema()["properties"]
