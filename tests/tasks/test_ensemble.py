"""Adapters that vote: each answers as it does alone, and the vote is gt.vote's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import DataError, SettingsError
from graftune.tasks import run
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny

TEXTS = ["hello i want money", "good you can parcel", "please soon say refund"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ in seed or method, one on other labels, one on another split."""
    folder = tmp_path_factory.mktemp("runs")
    base = str(tiny.bert(folder / "bert"))
    data = str(tiny.write_jsonl(folder / "mail.jsonl", tiny.mail()))
    renamed = [{**row, "label": row["label"][:3]} for row in tiny.mail()]
    other = str(tiny.write_jsonl(folder / "renamed.jsonl", renamed))

    def train(name: str, method: Any, train_on: Any = data, **more: Any) -> None:
        settings = RunSettings(
            base=base, data=train_on, method=method, out=str(folder / name),
            train={"steps": 4, "lr": 0.05, "eval_every": 0, "head_start": False, **more},
        )  # fmt: skip
        run.train(settings)

    prompt = {"name": "prompttuning", "length": 3}
    train("a", prompt, seed=1)
    train("b", prompt, seed=2)
    train("c", {"name": "lora", "r": 2}, seed=3, drop=1)
    train("renamed", prompt, other)
    train("split", prompt, {"train": data, "seed": 5})
    return folder


@pytest.mark.parametrize("how", ["majority", "mean"])
def test_members_answer_as_alone_and_the_vote_is_theirs(runs: Path, how: str) -> None:
    names = [str(runs / name) for name in "abc"]
    alone = [run.predict(name, TEXTS) for name in names]
    found = run.predict(names[0], TEXTS, others=names[1:], vote=how)
    for at, one in enumerate(found):
        said = [answers[at] for answers in alone]
        assert one["members"] == [answer["label"] for answer in said]
        chances = torch.tensor([list(answer["probabilities"].values()) for answer in said])
        wanted = gt.vote(chances.log(), 3, how=how)[0]
        assert torch.allclose(torch.tensor(list(one["probabilities"].values())), wanted)
        assert one["label"] == list(one["probabilities"])[int(wanted.argmax())]
        assert one["text"] == TEXTS[at]


def test_each_members_metrics_stand_beside_the_votes(runs: Path) -> None:
    names = [str(runs / name) for name in "abc"]
    found = run.evaluate(names[0], others=names[1:])
    assert found["vote"] == "majority"
    for one in found["members"]:
        assert one["metrics"] == run.evaluate(one["path"])["metrics"]
    assert [one["path"] for one in found["members"]] == names
    answers = run.predict(names[0], [row["text"] for row in tiny.mail()], others=names[1:])
    right = [
        answer["label"] == row["label"] for answer, row in zip(answers, tiny.mail(), strict=True)
    ]
    every = run.evaluate(names[0], str(runs / "mail.jsonl"), others=names[1:])
    assert every["metrics"]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_who_can_not_vote_together_is_told(runs: Path, tmp_path: Path) -> None:
    def told(*others: str, **more: Any) -> str:
        with pytest.raises((SettingsError, DataError)) as caught:
            run.predict(runs / "a", TEXTS, others=[runs / name for name in others], **more)
        return str(caught.value)

    assert 'vote is "majorty"' in told("b", vote="majorty")
    assert 'Did you mean "majority"?' in told("b", vote="majorty")
    assert "labels is ['delivery', 'refund'] in" in told("renamed")
    assert 'a/adapter" is given twice' in told("b", "a/adapter")
    assert "needs two adapters or more" in told(vote="mean")
    assert "the base alone" in told("b", base_only=True)
    with pytest.raises(SettingsError, match=r"data\.seed is 0 in .*a\" and 5 in .*split"):
        run.evaluate(runs / "a", others=[runs / "split"])
    run.evaluate(runs / "a", str(runs / "mail.jsonl"), others=[runs / "split"])


def test_other_bases_and_written_answers_are_refused(runs: Path, tmp_path: Path) -> None:
    import shutil

    moved = Path(shutil.copytree(runs / "b", tmp_path / "moved"))
    text = (moved / "graftune_task.json").read_text()
    (moved / "graftune_task.json").write_text(text.replace(str(runs / "bert"), "demo:minilm"))
    with pytest.raises(SettingsError, match=r"base is .*bert.* and 'demo:minilm' in .*moved"):
        run.predict(runs / "a", TEXTS, others=[moved])
    data = tiny.write_jsonl(tmp_path / "lessons.jsonl", tiny.lessons())
    for seed in (1, 2):
        run.train(
            RunSettings(
                base=str(tiny.llama(tmp_path / "llama")),
                task="instruct",
                data=str(data),
                method={"name": "prompttuning", "length": 2},
                out=str(tmp_path / f"say{seed}"),
                train={"steps": 1, "seed": seed},
            )
        )
    with pytest.raises(SettingsError, match="instruct, which writes its answers"):
        run.predict(tmp_path / "say1", ["say hello"], others=[tmp_path / "say2"])
