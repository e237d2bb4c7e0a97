"""Runs that start from another adapter's values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import BaseMismatchError, FormatError, SettingsError
from graftune.formats.tensors import read_tensors
from graftune.tasks import run
from graftune.tasks.result import Silent
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny

WEIGHTS = "adapter_model.safetensors"
PROMPT = {"name": "prompttuning", "length": 4, "init": "random"}


def settings(folder: Path, name: str, **values: Any) -> RunSettings:
    made = RunSettings(
        base=str(folder / "bert"), data=str(folder / "mail.jsonl"), method=PROMPT,
        out=str(folder / name), name=name, train={"steps": 4, "batch_size": 8, "save_every": 0},
    )  # fmt: skip
    return made.replaced(**values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a base, data, and the finished runs of a prompt and of LoRA."""
    folder = tmp_path_factory.mktemp("starts")
    tiny.bert(folder / "bert")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(40))
    run.train(settings(folder, "source"))
    run.train(settings(folder, "lora", method={"name": "lora", "r": 2}))
    return folder


def tokens(run_dir: Path) -> torch.Tensor:
    saved = read_tensors(run_dir / "adapter" / WEIGHTS)
    return next(value for name, value in saved.items() if "prompt" in name)


STILL = {"lr": 1e-30, "weight_decay": 0.0, "head_lr": 1e-30}
"""Training that changes nothing."""


@pytest.mark.parametrize("given", ["source", "source/adapter"])
def test_a_prompt_starts_from_another_and_its_head_does_not(
    given: str, trained: Path, tmp_path: Path
) -> None:
    start = str(trained / given)
    made = settings(trained, "still", out=str(tmp_path / "a"), start=start, train=STILL)
    result = run.train(made)
    assert torch.equal(tokens(tmp_path / "a"), tokens(trained / "source"))
    assert f'The adapter starts from "{start}".' in result.notes
    plain = run.train(made.replaced(start=None, out=str(tmp_path / "b")))
    assert not torch.equal(tokens(tmp_path / "b"), tokens(trained / "source"))
    heads = [read_tensors(tmp_path / one / "adapter" / WEIGHTS) for one in "ab"]
    assert all(
        torch.equal(heads[0][name], heads[1][name]) for name in heads[0] if "classifier" in name
    )
    assert result.parameters == plain.parameters


def test_it_predicts_as_it_was_measured_without_what_it_started_from(
    trained: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained / "source", tmp_path / "copy")
    made = settings(trained, "start", out=str(tmp_path / "run"), start=str(copy))
    result = run.train(made)
    shutil.rmtree(copy)
    assert run.evaluate(tmp_path / "run", batch_size=16)["metrics"] == result.metrics["test"]


def test_the_same_method_of_any_kind_starts_from_its_own(trained: Path, tmp_path: Path) -> None:
    made = settings(trained, "still", out=str(tmp_path / "a"), start=str(trained / "lora"),
                    method={"name": "lora", "r": 2}, train=STILL)  # fmt: skip
    run.train(made)
    ours, theirs = (
        read_tensors(at / "adapter" / WEIGHTS) for at in (made.run_dir, trained / "lora")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora" in name)
    with pytest.raises(SettingsError, match=r'No start from "start".*expected \(3, 32\)'):
        run.train(made.replaced(method={"name": "lora", "r": 3}, out=str(tmp_path / "b")))


def test_a_resumed_run_needs_its_start_no_more(trained: Path, tmp_path: Path) -> None:
    made = settings(trained, "resumed", start=str(trained / "source"), out=str(tmp_path / "whole"),
                    train={"steps": 6, "eval_every": 2, "save_every": 2})  # fmt: skip
    whole = run.train(made)

    class Interrupting(Silent):
        def on_eval(self, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 4:  # after the checkpoint of step 2
                raise KeyboardInterrupt

    copy = shutil.copytree(trained / "source", tmp_path / "copy")
    made = made.replaced(start=str(copy), out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        run.train(made, watch=Interrupting())
    shutil.rmtree(copy)
    resumed = run.train(made, resume=True)
    assert resumed.metrics == whole.metrics
    assert torch.equal(tokens(tmp_path / "run"), tokens(tmp_path / "whole"))
    assert run.train(made, resume=True).metrics == whole.metrics


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": {**PROMPT, "length": 5}}, "of length 4; method.length is 5"),
        ({"method": {"name": "lora"}}, "which is PromptTuning; LoRA starts from LoRA"),
        ({"method": {"name": "full"}}, "FullFineTuning trains the base in place"),
        ({"start": "lora"}, "which is LoRA; PromptTuning starts from any soft prompt"),
    ],
)
def test_another_length_or_method_is_refused_before_any_work(
    values: dict[str, Any], words: str, trained: Path, tmp_path: Path
) -> None:
    start = str(trained / values.pop("start", "source"))
    made = settings(trained, "run", out=str(tmp_path / "run"), **values)
    with pytest.raises(SettingsError, match=words):
        run.plan(made.replaced(start=start))
    with pytest.raises(SettingsError, match=words):
        run.train(made.replaced(start=start))
    assert not (tmp_path / "run").exists()


def test_prompts_of_in_context_learning_have_no_start(trained: Path) -> None:
    made = RunSettings(
        base=str(trained / "bert"), data=str(trained / "mail.jsonl"), method="in-context",
        start=str(trained / "source"),
    )  # fmt: skip
    with pytest.raises(SettingsError, match="start names an adapter, but in-context"):
        run.plan(made)


def test_another_base_or_no_adapter_is_refused_before_any_work(
    trained: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(trained / "source" / "adapter", tmp_path / "other"))
    own = json.loads((other / "graftune.json").read_text())
    own["base"]["sizes"]["hidden_size"] = 48
    (other / "graftune.json").write_text(json.dumps(own))
    made = settings(trained, "run", out=str(tmp_path / "run"))
    with pytest.raises(BaseMismatchError, match=r"start: .* with hidden_size 48; this model"):
        run.plan(made.replaced(start=str(other)))
    with pytest.raises(FormatError, match="start: no adapter directory at"):
        run.train(made.replaced(start=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()
