"""What a transfer's prompts are called, and their tokens, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftune as gt
from graftune.compare.sources import TARGET, named, prompts, save
from graftune.errors import SettingsError
from graftune.tasks.models import load_base
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    base = tiny.llama(tmp_path_factory.mktemp("base") / "llama")
    method = {"name": "prompttuning", "length": 3}
    return RunSettings(base=str(base), task="instruct", data="none.jsonl", method=method)


def written(settings: RunSettings, method: gt.Method, folder: Path) -> torch.Tensor:
    """Returns the virtual tokens of a prompt that it writes."""
    adapter = gt.attach(load_base(settings.base, "causal-lm").model, method)
    adapter.save(folder)
    return method.prompt_of(adapter)  # pyright: ignore[reportAttributeAccessIssue]


def test_names_are_short_plain_and_each_once() -> None:
    given = ["runs/a", "runs/b/adapter", "old/a", "runs/c/checkpoints/checkpoint-5", "x/v1.2"]
    assert list(named("runs/new", given)) == ["a", "b", "a-2", "c-checkpoint-5", "v1-2"]
    with pytest.raises(SettingsError, match='"runs/a/" is "runs/a" once more'):
        named("runs/new", ["runs/a", "runs/a/"])
    with pytest.raises(SettingsError, match='"runs/new" is the target itself'):
        named("runs/new", ["runs/new"])


def test_prompts_of_any_kind_and_writer_are_read(settings: RunSettings, tmp_path: Path) -> None:
    own, theirs, multi = (tmp_path / name for name in ("own", "theirs", "multi"))
    wanted = {
        TARGET: written(settings, gt.PromptTuning(length=3), own),
        "theirs": written(settings, gt.PromptTuning(length=3, position="front"), theirs),
        "multi": written(settings, gt.MultitaskPromptTuning(length=3, tasks=2), multi),
    }
    (theirs / "graftune.json").unlink()  # as HF PEFT writes it
    found = prompts(settings, {TARGET: str(own), "theirs": str(theirs), "multi": str(multi)})
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_saved_start_is_read_again(settings: RunSettings, tmp_path: Path) -> None:
    tokens = torch.randn(3, 32)
    save(settings, tokens, tmp_path / "start")
    assert torch.equal(prompts(settings, {TARGET: str(tmp_path / "start")})[TARGET], tokens)
    with pytest.raises(SettingsError, match=r"no start of the average: .*expected \(3, 32\)"):
        save(settings, torch.randn(4, 32), tmp_path / "other")
    with pytest.raises(SettingsError, match="method is LoRA, expected PromptTuning"):
        save(settings.replaced(method={"name": "lora"}), tokens, tmp_path / "other")
    assert not (tmp_path / "other").exists()
