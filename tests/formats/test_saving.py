"""What is saved: the same bytes every time, whole whatever happens, the same logits anywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import FormatError
from graftune.formats import atomic, saving
from tests.families import FAMILIES

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "graftune.json"]
METHODS: dict[str, Any] = {
    "lora": lambda: gt.LoRA(r=4),
    "lora on slices": lambda: gt.LoRA(r=4, targets="qv"),
    "pissa": lambda: gt.LoRA(r=4, init="pissa", rslora=True, alpha=3.0),
    "dora and tokens": lambda: gt.LoRA(r=2, dora=True, trainable_tokens=(9, 7)),
    "bitfit": lambda: gt.BitFit(),
    "full": lambda: gt.FullFineTuning(),
    "full beside the base": lambda: gt.FullFineTuning(keep_base=True),
}


def base() -> Any:
    return FAMILIES["gpt2"].build(task="classification")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**FAMILIES["gpt2"].inputs(task="classification")).logits


def trained(method: Any, seed: int = 0, model: nn.Module | None = None) -> Any:
    """Returns an adapter whose every tensor was moved."""
    adapter = gt.attach(model or base(), method, "task", seed=0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return adapter


def digest(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("name", METHODS)
def test_save_and_load_gives_the_same_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    adapter = trained(METHODS[name]())
    assert adapter.save(tmp_path / "a") == tmp_path / "a"
    assert sorted(os.listdir(tmp_path / "a")) == FILES
    model = base()
    again = gt.load(model, tmp_path / "a")
    assert torch.equal(logits(model), logits(adapter.model))
    assert again.name == "a"
    assert again.count() == adapter.count()
    assert again.head_names == adapter.head_names
    assert again.method == adapter.method
    assert list(again.state_dict()) == list(adapter.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_adapter_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    trained(METHODS[name]()).save(tmp_path / "a")
    trained(METHODS[name]()).save(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    model = base()
    gt.load(model, tmp_path / "a", name="task").save(tmp_path / "c")
    assert digest(tmp_path / "a") == digest(tmp_path / "c")


def test_another_process_gives_the_same_bytes_and_logits(tmp_path: Path) -> None:
    adapter = trained(METHODS["lora"]())
    adapter.save(tmp_path / "a")
    torch.save(logits(adapter.model), tmp_path / "logits")
    code = """
import sys, torch, graftune as gt
from pathlib import Path
from tests.formats.test_saving import base, logits
here = Path(sys.argv[1])
model = base()
adapter = gt.load(model, here / "a", name="task")
assert torch.equal(logits(model), torch.load(here / "logits", weights_only=True))
adapter.save(here / "b")
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_kill_at_any_moment_of_saving_leaves_a_whole_adapter(tmp_path: Path) -> None:
    old, new = trained(METHODS["lora"]()), trained(METHODS["lora"](), seed=1)
    whole = {}
    for adapter, name in ((old, "old"), (new, "new")):
        adapter.save(tmp_path / name)
        whole[name] = digest(tmp_path / name)
    path = tmp_path / "a"
    old.save(path)
    start = time.perf_counter()
    new.save(path)
    length = time.perf_counter() - start
    for attempt in range(50):
        child = os.fork()
        if child == 0:
            while True:  # until it is killed
                old.save(path)
                new.save(path)
        time.sleep(random.Random(attempt).uniform(0.0, 2 * length))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert digest(path) in whole.values()
        gt.inspect(path)
    new.save(path)
    assert digest(path) == whole["new"]
    assert sorted(os.listdir(tmp_path)) == ["a", "new", "old"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, tensors: Any) -> None:
        path.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving, "write_tensors", write)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"the disk is full .* nothing was written"):
        trained(METHODS["lora"]()).save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_two_processes_saving_to_one_place_leave_one_version(tmp_path: Path) -> None:
    adapters = [trained(METHODS["lora"](), seed=seed) for seed in (1, 2)]
    whole = []
    for adapter in adapters:
        adapter.save(tmp_path / "one")
        whole.append(digest(tmp_path / "one"))
    children = []
    for adapter in adapters:
        child = os.fork()
        if child == 0:
            for _ in range(5):
                adapter.save(tmp_path / "a")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert digest(tmp_path / "a") in whole


def test_saving_into_a_folder_being_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "LOCK_TIMEOUT_S", 0.05)
    with (
        atomic.locked(tmp_path / "a"),
        pytest.raises(FormatError, match="is being written by another process"),
    ):
        trained(METHODS["lora"]()).save(tmp_path / "a")


def test_an_adapter_without_numbers_is_not_saved(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build(meta=True)
    with pytest.raises(FormatError, match="meta device"):
        gt.attach(model, gt.LoRA(r=2)).save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_merged_adapter_can_be_saved(tmp_path: Path) -> None:
    adapter = trained(METHODS["lora"]())
    before = logits(adapter.model)
    gt.merge(adapter.model, "task")
    adapter.save(tmp_path / "a")
    model = base()
    gt.load(model, tmp_path / "a")
    assert torch.equal(logits(model), before)


def test_transformers_own_saving_writes_a_directory_that_loads(tmp_path: Path) -> None:
    adapter = trained(METHODS["lora on slices"]())
    adapter.model.save_pretrained(tmp_path / "a")
    model = base()
    gt.load(model, tmp_path / "a")
    assert torch.equal(logits(model), logits(adapter.model))


def test_the_config_is_of_pefts_form(tmp_path: Path) -> None:
    trained(gt.LoRA(r=4, targets="attention", alpha=8.0)).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "SEQ_CLS"
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert config["modules_to_save"] == ["score"]
    assert config["fan_in_fan_out"] is True
    assert config["inference_mode"] is True
    assert config["rank_pattern"] == {}


def test_slices_of_one_size_need_no_pattern(tmp_path: Path) -> None:
    trained(gt.LoRA(r=4, targets="qv", alpha=2.0)).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_a_method_of_ours_has_a_type_of_its_own(tmp_path: Path) -> None:
    trained(gt.BitFit()).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "BITFIT"
    assert config["subset"] == "all"


def test_the_card_tells_what_it_is(tmp_path: Path) -> None:
    model = base()
    model.config._name_or_path = "openai-community/gpt2"
    adapter = trained(gt.LoRA(r=4), model=model)
    adapter.save(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    head = card.split("---")[1]
    assert "library_name: peft" in head
    assert "base_model: openai-community/gpt2" in head
    assert '- "base_model:adapter:openai-community/gpt2"' in head
    assert "pipeline_tag: text-classification" in head
    assert f"{adapter.count():,}" in card
    assert 'gt.load(model, "path/to/task"' in card
    assert "PeftModel.from_pretrained" in card
    trained(gt.BitFit()).save(tmp_path / "b")
    other = (tmp_path / "b" / "README.md").read_text()
    assert "library_name: graftune" in other
    assert "PeftModel" not in other


def test_a_folder_of_this_machine_is_no_name_on_a_hub(tmp_path: Path) -> None:
    model = base()
    model.config._name_or_path = str(tmp_path / "models" / "gpt2")
    trained(gt.LoRA(r=4), model=model).save(tmp_path / "a")
    assert "base_model:" not in (tmp_path / "a" / "README.md").read_text().split("---")[1]
