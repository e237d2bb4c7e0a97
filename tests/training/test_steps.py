"""Penalties and schedules reach a method alike in our Trainer, the stock one and a bare loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import graftune as gt
from graftune.anatomy import Anatomy
from graftune.errors import SettingsError, TrainingError
from graftune.methods.base import Method
from graftune.sites.base import Graft
from graftune.sites.parameter import OwnValue, own_value
from graftune.training import Trainer, training_args
from graftune.training.lengths import PadToLongest
from tests.training.models import examples, tiny

STEPS = 6


class Noted(OwnValue):
    """A bias, with a count of passes that only resumed training needs."""

    resumes: ClassVar[tuple[str, ...]] = ("passes",)

    def __init__(self, value: Tensor) -> None:
        super().__init__(value)
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.begun = 0

    def begin_forward(self) -> None:
        self.begun += 1


@dataclass(frozen=True, kw_only=True)
class Pulled(Method):
    """The pooler's bias, pulled towards zero; it keeps a note of what it is told."""

    name: ClassVar[str] = "Pulled"
    least: int = 2

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        graft = own_value(model, "bert.pooler.dense.bias")
        graft.delta = Noted(graft.delta.value.detach() + 1)
        return [graft]

    def needs_steps(self, adapter: Any) -> bool:
        return not getattr(adapter, "finished", False)

    def check_steps(self, total: int) -> None:
        if total < self.least:
            raise SettingsError(f"Pulled needs {self.least} steps, found {total}.")

    def penalty(self, adapter: Any) -> Tensor:
        return 1e3 * adapter.grafts[0].delta.value.square().sum()

    def advance(self, adapter: Any, step: int, total: int) -> None:
        delta = adapter.grafts[0].delta
        along = torch.cosine_similarity(delta.value.grad, delta.value.detach(), dim=0)
        assert along > 0.9, "the penalty's gradient is missing"
        delta.passes += 1
        adapter.__dict__.setdefault("told", []).append((step, total))

    def finish(self, adapter: Any) -> None:
        adapter.finished = True


def attached(least: int = 2) -> tuple[Any, gt.Adapter]:
    model = tiny(dropout=0.0)
    return model, gt.attach(model, Pulled(least=least), name="task")


def arguments(folder: Path, **settings: Any) -> Any:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "disable_tqdm": True}
    return training_args(folder, **(given | {"use_cpu": True, "save_strategy": "no"} | settings))


def by_ours(model: Any, folder: Path, **settings: Any) -> Any:
    run = Trainer(model, arguments(folder, **settings), train_dataset=examples())
    run.train()
    return run


def by_the_stock_one(model: Any, folder: Path, **settings: Any) -> Any:
    run = transformers.Trainer(
        model,
        arguments(folder, **settings),
        PadToLongest(0),
        train_dataset=examples(),
        callbacks=[gt.AdapterCallback()],
    )
    run.train()
    return run


def by_hand(model: Any, folder: Path, **settings: Any) -> Any:
    adapter = gt.adapters(model)["task"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-5)
    adapter.begin(STEPS)
    model.train()
    rows, collate = examples(), PadToLongest(0)
    for step in range(1, STEPS + 1):
        batch = collate(rows[4 * step - 4 : 4 * step])
        (model(**batch).loss + adapter.penalty()).backward()
        optimizer.step()
        adapter.advance(step)
        optimizer.zero_grad()
    adapter.finish()


LOOPS = {"ours": by_ours, "stock": by_the_stock_one, "by hand": by_hand}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_penalty_and_schedule_are_called(loop: Any, tmp_path: Path) -> None:
    model, adapter = attached()
    before = adapter.grafts[0].delta.value.abs().sum().item()
    loop(model, tmp_path)
    assert adapter.told == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert adapter.finished
    assert adapter.grafts[0].delta.value.abs().sum().item() < before
    assert adapter.grafts[0].delta.begun >= STEPS


@pytest.mark.parametrize("loop", [by_ours, by_the_stock_one], ids=["ours", "stock"])
def test_accumulated_batches_are_one_step(loop: Any, tmp_path: Path) -> None:
    model, adapter = attached()
    loop(model, tmp_path, gradient_accumulation_steps=2, max_steps=3)
    assert adapter.told == [(1, 3), (2, 3), (3, 3)]


def test_the_stock_trainer_adds_the_penalty_that_ours_adds(tmp_path: Path) -> None:
    values = []
    for loop in (by_ours, by_the_stock_one):
        torch.manual_seed(0)
        model, adapter = attached()
        loop(
            model,
            tmp_path,
            gradient_accumulation_steps=2,
            max_steps=4,
            optim="sgd",
            learning_rate=1e-4,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )
        values.append(adapter.grafts[0].delta.value.detach().clone())
    # Beside a penalty of thousands the stock one's loss, twice ours where models count no items.
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_schedule_that_does_not_fit_is_told_before_the_first_step(
    loop: Any, tmp_path: Path
) -> None:
    model, adapter = attached(least=100)
    with pytest.raises(SettingsError, match="needs 100 steps, found 6"):
        loop(model, tmp_path)
    assert adapter.grafts[0].delta.begun == 0


def test_training_without_the_calls_is_refused_and_says_how_to_add_them(tmp_path: Path) -> None:
    model, _ = attached()
    batch = PadToLongest(0)(examples(4))
    model.train()
    with pytest.raises(TrainingError, match=r"gt\.AdapterCallback.*adapter\.begin\(total_steps\)"):
        model(**batch)
    stock = transformers.Trainer(
        model, arguments(tmp_path), PadToLongest(0), train_dataset=examples()
    )
    with pytest.raises(TrainingError, match="Pulled has a penalty or a schedule"):
        stock.train()
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    gt.activate(model, None)
    model.train()
    model(**batch)


@pytest.mark.parametrize("steps", [0, -1, None, True, 2.5])
def test_begin_takes_a_number_of_steps(steps: Any) -> None:
    _, adapter = attached()
    with pytest.raises(SettingsError, match="begin takes the number of optimizer steps"):
        adapter.begin(steps)
    assert adapter.total_steps is None


def test_steps_are_those_that_were_told() -> None:
    _, adapter = attached()
    with pytest.raises(TrainingError, match=r"call adapter\.begin\(total_steps\) before"):
        adapter.advance(1)
    adapter.begin(3)
    for step in (0, 4):
        with pytest.raises(TrainingError, match=f"step {step} is not one of the 3"):
            adapter.advance(step)


def test_a_scaled_loss_is_refused_by_the_callback(tmp_path: Path) -> None:
    model, _ = attached()
    args = arguments(tmp_path)
    args.fp16 = True
    state = transformers.TrainerState(max_steps=5)
    with pytest.raises(TrainingError, match=r"fp16 needs gt\.Trainer"):
        gt.AdapterCallback().on_train_begin(args, state, transformers.TrainerControl(), model=model)


def test_a_method_without_either_is_left_alone(tmp_path: Path) -> None:
    model = tiny()
    adapter = gt.attach(model, gt.LoRA(r=2), name="task")
    assert adapter.penalty() == 0.0
    by_the_stock_one(model, tmp_path)
    adapter.finish()


def test_what_only_training_needs_is_in_checkpoints_alone(tmp_path: Path) -> None:
    model, adapter = attached()
    by_ours(model, tmp_path, save_strategy="steps", save_steps=4)
    assert "bert.pooler.dense.bias.passes" not in adapter.state_dict()
    assert adapter.state_dict(training=True)["bert.pooler.dense.bias.passes"] == STEPS
    model, again = attached()
    resumed = Trainer(model, arguments(tmp_path / "b"), train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.told == [(5, STEPS), (6, STEPS)]
    assert again.grafts[0].delta.passes == STEPS
