"""Settings of runs that spare memory: they act, or are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftune.errors import SettingsError
from graftune.tasks import run
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny


def lessons(folder: Path, out: str, **train: Any) -> RunSettings:
    base, data = folder / "llama", folder / "lessons.jsonl"
    if not data.exists():
        tiny.llama(base)
        tiny.write_jsonl(data, tiny.lessons(24))
    return RunSettings(
        base=str(base), task="instruct", data=str(data), method="lora", out=str(folder / out),
        train={"epochs": 1, "lr": 1e-2, "batch_size": 8, "save_every": 0, **train},
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_in_pieces_learns_alike_and_says_so(tmp_path: Path) -> None:
    plain = run.train(lessons(tmp_path, "plain"))
    result = run.train(lessons(tmp_path, "pieces", loss_chunk=16, precision="float32"))
    note = "The loss was computed 16 tokens at a time; logits were never whole."
    assert note in result.notes
    assert note not in plain.notes
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert result.metrics["test"] == pytest.approx(plain.metrics["test"], rel=1e-3)
    assert result.settings["train"]["loss_chunk"] == 16


def test_checkpointing_and_bfloat16_go_with_pieces(tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "gradient_checkpointing": True}
    run.train(lessons(tmp_path, "plain", **settings))
    result = run.train(lessons(tmp_path, "pieces", loss_chunk=16, **settings))
    assert any("16 tokens at a time" in note for note in result.notes)
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "plain"), rel=2e-2)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"loss_chunk": 16}, "train.loss_chunk is 16, but the loss of classification isn't"),
        ({"offload_activations": True}, "offload_activations moves what a GPU holds to the host"),
        ({"offload_optimizer": True}, "offload_optimizer moves what a GPU holds to the host"),
        ({"optimizer": "lomo"}, 'the optimizer "lomo" can\'t run on the cpu here'),
        ({"loss_chunk": 0}, "train.loss_chunk"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_loaded(
    train: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tiny.write_jsonl(tmp_path / "mail.jsonl", tiny.mail(40))
    data, out = str(tmp_path / "mail.jsonl"), str(tmp_path / "run")
    with pytest.raises(SettingsError, match=words):
        run.train(RunSettings(base="nowhere", data=data, out=out, train=train))
    assert not (tmp_path / "run").exists()
