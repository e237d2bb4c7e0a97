"""Checkpoints: a resumed run equals the uninterrupted one, what is refused, and interruptions."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import graftune as gt
from graftune.errors import TrainingError
from graftune.training import checkpoints
from tests.training.models import examples, tiny
from tests.training.runs import assert_equal, curve, tensors, trainer

METHODS = {
    "LoRA": gt.LoRA(r=2, dropout=0.1),
    "DoRA": gt.LoRA(r=2, dora=True),
    "PiSSA": gt.LoRA(r=2, init="pissa"),
    "BitFit": gt.BitFit(),
    "full": gt.FullFineTuning(),
    "full beside the base": gt.FullFineTuning(keep_base=True),
}


@pytest.mark.parametrize("step", [4, 6], ids=["mid-epoch", "at an epoch's end"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, method, step) -> None:
    whole = trainer(tmp_path / "whole", method, save_steps=step, max_steps=10)
    whole.train()
    again = trainer(tmp_path / "again", method, save_steps=step, max_steps=10)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert curve(again) == curve(whole)
    assert_equal(tensors(again), tensors(whole))


@pytest.mark.parametrize(
    "settings",
    [
        {"group_by_length": False},
        {"gradient_accumulation_steps": 2},
        {"logging_steps": 3},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": examples(6, seed=1)},
        {"lr_scheduler_type": "cosine", "weight_decay": 0.1, "label_smoothing_factor": 0.1},
        {"data_seed": 5},
        {"activation_checkpointing": True},
    ],
    ids=[
        "random order",
        "accumulation",
        "rare logs",
        "epochs",
        "cosine",
        "data seed",
        "checkpointing",
    ],
)
def test_resuming_is_exact_under_other_settings(tmp_path, settings) -> None:
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    first = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[0]
    again = trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(first))
    assert curve(again) == curve(whole)
    assert_equal(tensors(again), tensors(whole))


def test_resuming_in_a_fresh_process_is_exact(tmp_path) -> None:
    import subprocess
    import sys

    whole = trainer(tmp_path / "whole", max_steps=8)
    whole.train()
    code = (
        "import sys, json; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.training.runs import trainer, curve\n"
        "run = trainer(Path(sys.argv[1]), max_steps=8)\n"
        "run.train(resume_from_checkpoint=sys.argv[2])\n"
        "print(json.dumps(curve(run)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "again", tmp_path / "whole" / "checkpoint-4"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(found.stdout.splitlines()[-1]) == [list(row) for row in curve(whole)]


def test_a_checkpoint_holds_the_adapter_only(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.train()
    folder = tmp_path / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "training_args.bin"} & names
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    base = sum(p.numel() * p.element_size() for p in tiny().parameters())
    assert (folder / "adapter_model.safetensors").stat().st_size < base / 2


def test_a_checkpoint_is_an_adapter_directory(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.train()
    fresh = tiny()
    gt.load(fresh, tmp_path / "checkpoint-4", name="back")
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    trained: Any = run.model
    assert torch.equal(fresh(**batch).logits, trained.eval()(**batch).logits)


def test_the_last_checkpoint_is_found(tmp_path) -> None:
    trainer(tmp_path, max_steps=8).train()
    again = trainer(tmp_path, max_steps=10)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10


def test_several_adapters_lie_in_a_folder_each(tmp_path) -> None:
    def stacked() -> Any:
        model = tiny()
        gt.attach(model, gt.LoRA(r=2, train_head=False), name="one", seed=0)
        gt.attach(model, gt.LoRA(r=4), name="two", seed=1)
        gt.activate(model, gt.Stack("one", "two"))
        return model

    whole = trainer(tmp_path / "a", model=stacked(), max_steps=8)
    names = [adapter.name for adapter in whole.training_adapters()]
    assert names == ["one", "two"]
    whole.train()
    for name in names:
        assert (tmp_path / "a" / "checkpoint-4" / name / "adapter_config.json").exists()
    again = trainer(tmp_path / "b", model=stacked(), max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert curve(again) == curve(whole)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 8,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 0.3,
        "save_total_limit": 2,
    }
    run = trainer(tmp_path, eval_dataset=examples(8, seed=2), **settings)
    run.train()
    best = Path(str(run.state.best_model_checkpoint))
    assert best.parent == tmp_path
    losses = {r["step"]: r["eval_loss"] for r in run.state.log_history if "eval_loss" in r}
    assert best.name == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    assert run.evaluate()["eval_loss"] == min(losses.values())
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


def test_other_methods_settings_are_refused_with_the_reason(tmp_path) -> None:
    trainer(tmp_path, gt.LoRA(r=2), max_steps=4).train()
    other = trainer(tmp_path, gt.LoRA(r=4), max_steps=8)
    before = tensors(other)
    with pytest.raises(TrainingError, match='other settings of "task": r was 2 and is 4'):
        other.train(resume_from_checkpoint=True)
    assert_equal(before, tensors(other))
    with pytest.raises(TrainingError, match="method was 'LoRA' and is 'BitFit'"):
        trainer(tmp_path, gt.BitFit(), max_steps=8).train(resume_from_checkpoint=True)


def test_other_data_are_refused_unless_the_order_does_not_matter(tmp_path) -> None:
    trainer(tmp_path, max_steps=4).train()
    other = {"train_dataset": examples(20), "per_device_train_batch_size": 2}
    with pytest.raises(TrainingError, match="batch size was 4 and is 2, examples was 24 and is 20"):
        trainer(tmp_path, max_steps=8, **other).train(resume_from_checkpoint=True)
    run = trainer(tmp_path, max_steps=8, ignore_data_skip=True, **other)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 8


def test_other_adapters_are_refused(tmp_path) -> None:
    trainer(tmp_path, max_steps=4).train()
    model = tiny()
    gt.attach(model, gt.LoRA(r=2), name="one")
    gt.attach(model, gt.LoRA(r=2, train_head=False), name="two")
    gt.activate(model, gt.Stack("one", "two"))
    with pytest.raises(
        TrainingError, match='of the adapters "task", and the model trains "one", "two"'
    ):
        trainer(tmp_path, model=model, max_steps=8).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("wanted", [True, "nowhere"])
def test_a_missing_checkpoint_is_told(tmp_path, wanted) -> None:
    run = trainer(tmp_path / "out")
    with pytest.raises(TrainingError, match="checkpoint"):
        run.train(resume_from_checkpoint=wanted if wanted is True else str(tmp_path / wanted))


def test_the_folder_of_checkpoints_names_the_last(tmp_path) -> None:
    trainer(tmp_path, max_steps=4).train()
    with pytest.raises(TrainingError, match=r'Did you mean ".*checkpoint-4"'):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path))


def test_a_checkpoint_of_another_trainer_is_told(tmp_path) -> None:
    trainer(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    with pytest.raises(TrainingError, match=r"isn't a checkpoint of gt\.Trainer"):
        trainer(tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_a_model_without_adapters_trains_as_ever(tmp_path) -> None:
    whole = trainer(tmp_path / "a", model=tiny(), max_steps=8)
    whole.train()
    assert (tmp_path / "a" / "checkpoint-4" / "model.safetensors").exists()
    again = trainer(tmp_path / "b", model=tiny(), max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert curve(again) == curve(whole)


def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(tmp_path, monkeypatch) -> None:
    run = trainer(tmp_path, max_steps=8)
    save = torch.save

    def full(data: Any, path: Any, *rest: Any, **more: Any) -> None:
        if "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device")
        save(data, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_that_reads_back_otherwise_is_an_error(tmp_path, monkeypatch) -> None:
    run = trainer(tmp_path, max_steps=4)
    monkeypatch.setattr(checkpoints, "_same", lambda state, read: False)
    with pytest.raises(TrainingError, match="doesn't hold what was written"):
        run.train()
    assert checkpoints.last_checkpoint(tmp_path) is None


def test_training_again_into_a_folder_replaces_its_checkpoints(tmp_path) -> None:
    trainer(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "stale").touch()
    run = trainer(tmp_path, gt.BitFit(), max_steps=4)
    run.train()
    assert not (tmp_path / "checkpoint-4" / "stale").exists()
    manifest = checkpoints.read_manifest(tmp_path / "checkpoint-4")
    assert manifest["adapters"]["task"]["method"] == "BitFit"


class Interrupts(TrainerCallback):
    def __init__(self, at: int, times: int = 1) -> None:
        self.at, self.times = at, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_an_interruption_keeps_a_checkpoint_of_the_step(tmp_path) -> None:
    kept: list[Path | None] = []
    whole = trainer(tmp_path / "whole", max_steps=9)
    whole.train()
    before = signal.getsignal(signal.SIGINT)
    cut = trainer(
        tmp_path / "cut", max_steps=9, callbacks=[Interrupts(5)], on_interrupt=kept.append
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        cut.train()
    assert kept == [tmp_path / "cut" / "checkpoint-6"]
    assert "resume_from_checkpoint" in caught.value.__notes__[0]
    assert signal.getsignal(signal.SIGINT) is before
    again = trainer(tmp_path / "cut", max_steps=9)
    again.train(resume_from_checkpoint=True)
    assert curve(again) == curve(whole)


def test_a_second_interruption_does_not_wait(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=9, callbacks=[Interrupts(5, times=2)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_an_interruption_before_the_first_step_is_told(tmp_path) -> None:
    run = trainer(tmp_path, callbacks=[Interrupts(0, times=2)])
    with pytest.raises(KeyboardInterrupt) as caught:
        run.train()
    assert caught.value.__notes__ == ["No checkpoint had been written."]
