"""AdapterDrop in runs: `train.drop`, fixed or drawn, from the first step to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graftune as gt
from graftune.errors import SettingsError
from graftune.formats.tensors import read_tensors
from graftune.tasks import run
from graftune.tasks.result import Silent
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny

FEW = {"epochs": 2, "lr": 1e-2, "batch_size": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drop")
    tiny.bert(folder / "bert")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(80))
    return folder


def settings(files: Path, out: Path, drop: Any, **values: Any) -> RunSettings:
    made = RunSettings(
        base=str(files / "bert"), data=str(files / "mail.jsonl"), out=str(out), name="task",
        method={"name": "pfeiffer", "bottleneck": 4, "init": "bert"}, train={**FEW, "drop": drop},
    )  # fmt: skip
    return made.replaced(**values)


def answers(run_dir: Path) -> tuple[list[str], list[dict[str, float]]]:
    rows = [json.loads(line) for line in (run_dir / "predictions.test.jsonl").open()]
    return [row["text"] for row in rows], [row["probabilities"] for row in rows]


def probabilities(run_dir: Path, texts: list[str], **options: Any) -> list[dict[str, float]]:
    return [one["probabilities"] for one in run.predict(run_dir, texts, 16, **options)]


def test_a_fixed_number_holds_in_training_and_afterwards(files: Path, tmp_path: Path) -> None:
    result = run.train(settings(files, tmp_path / "run", 1))
    assert "The lowest 1 of 2 blocks have no adapter, now and later." in result.notes
    texts, expected = answers(tmp_path / "run")
    assert probabilities(tmp_path / "run", texts) == expected
    assert probabilities(tmp_path / "run", texts, drop=0) != expected
    found = run.evaluate(tmp_path / "run", batch_size=16)
    assert found["metrics"] == result.metrics["test"]
    untrained = start_of(files, tmp_path)
    tensors = read_tensors(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = {k: not tensors[k].equal(untrained[k]) for k in tensors if "encoder.layer" in k}
    assert all(did == ("layer.1." in name) for name, did in moved.items())


def start_of(files: Path, tmp_path: Path) -> dict[str, Any]:
    """Returns the tensors that a run of these settings begins with."""
    from graftune.tasks.models import load_base

    model = load_base(str(files / "bert"), labels=["delivery", "refund"]).model
    method = gt.PfeifferAdapter(bottleneck=4, init="bert")
    gt.attach(model, method, "task", seed=0).save(tmp_path / "start")
    return read_tensors(tmp_path / "start" / "adapter_model.safetensors")


def test_numbers_are_drawn_in_training_and_none_is_dropped_later(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.sites.plan import Plan

    seen: list[tuple[bool, int]] = []
    drawn = Plan.drawn

    def look(plan: Plan, training: bool) -> Plan:
        found = drawn(plan, training)
        seen.append((training, found.drop))
        return found

    monkeypatch.setattr(Plan, "drawn", look)
    result = run.train(settings(files, tmp_path / "run", [0, 2]))
    assert {drop for training, drop in seen if training} == {0, 1, 2}
    assert {drop for training, drop in seen if not training} == {0}
    told = "Each training pass leaves out the adapter in the lowest 0 to 2 of 2 blocks"
    assert any(note.startswith(told) for note in result.notes)
    texts, expected = answers(tmp_path / "run")
    assert probabilities(tmp_path / "run", texts) == expected
    every = [probabilities(tmp_path / "run", texts, drop=n) for n in (0, 1, 2)]
    assert every[0] == expected
    assert every[1] != every[0]
    assert every[2] != every[1]


def test_an_interrupted_run_draws_on(files: Path, tmp_path: Path) -> None:
    whole = run.train(settings(files, tmp_path / "whole", [0, 2]))

    class Interrupting(Silent):
        def on_eval(self, metrics: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    made = settings(files, tmp_path / "run", [0, 2])
    with pytest.raises(KeyboardInterrupt):
        run.train(made, watch=Interrupting())
    resumed = run.train(made, resume=True)
    assert resumed.history == whole.history
    assert resumed.metrics == whole.metrics


def test_a_fusion_is_measured_where_it_acts(files: Path, tmp_path: Path) -> None:
    for name in "ab":
        run.train(settings(files, tmp_path / name, 0, train={"epochs": None, "steps": 1}))
    result = run.train(
        settings(
            files,
            tmp_path / "run",
            1,
            beside={n: str(tmp_path / n) for n in "ab"},
            method={"name": "AdapterFusion", "members": ["a", "b"]},
        )
    )
    (drawn,) = result.heat_maps
    assert list(drawn["columns"]) == ["1"]


@pytest.mark.parametrize("drop", [3, [0, 3]])
def test_more_than_there_are_is_refused_before_training(
    drop: Any, files: Path, tmp_path: Path
) -> None:
    words = "this model's stacks have 2 at most"
    with pytest.raises(SettingsError, match=words) as error:
        run.train(settings(files, tmp_path / "run", drop))
    assert str(error.value).startswith(f"drop is {drop}: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_drop_that_leaves_nothing_to_train_is_refused(files: Path, tmp_path: Path) -> None:
    method = {"name": "pfeiffer", "bottleneck": 4, "train_head": False}
    with pytest.raises(SettingsError, match='leaves nothing of "task" to train: drop 1 blocks at'):
        run.train(settings(files, tmp_path / "run", 2, method=method))


@pytest.mark.parametrize("drop", [-1, "two", 1.5, [2, 1], [1], [0, 1, 2], True, [0, -1]])
def test_what_is_no_number_of_blocks_is_refused(drop: Any, files: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.drop: expected a number of blocks or \[low"):
        settings(files, files / "run", drop)


def test_what_trains_in_place_can_not_be_dropped(files: Path) -> None:
    with pytest.raises(SettingsError, match="trains the base in place, so that no block can"):
        run.plan(settings(files, files / "run", 1, method={"name": "full"}))
