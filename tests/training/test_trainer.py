"""Training: penalties and schedules, forwards of one's own, learning rates, other loops."""

from __future__ import annotations

import math
import shutil
from typing import Any, ClassVar

import pytest
import torch
import transformers

import graftune as gt
from graftune.errors import TrainingError
from graftune.training.trainer import Trainer
from tests.training.models import examples, tiny
from tests.training.runs import args, assert_equal, curve, tensors, trainer


def test_a_loss_that_is_not_finite_names_the_module(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=8)
    with torch.no_grad():
        run.model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(TrainingError) as caught:
        run.train()
    message = str(caught.value)
    assert "step 1" in message
    assert '"bert.encoder.layer.1.output.dense" is the first module' in message


def test_a_gradient_that_is_not_finite_names_the_parameter(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=8)
    parameter = next(gt.adapters(run.model)["task"].parameters())
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="first parameter whose gradient isn't finite"):
        run.train()


def penalised(weight: float) -> Any:
    """A LoRA with a penalty, a schedule and a learning rate of its own."""

    class Penalised(gt.LoRA):
        seen: ClassVar[list[tuple[int, int]]] = []

        def penalty(self, adapter: Any) -> torch.Tensor:
            return weight * torch.stack([p.square().sum() for p in adapter.parameters()]).sum()

        def advance(self, adapter: Any, step: int, total: int) -> None:
            assert any(p.grad is not None for p in adapter.parameters())
            self.seen.append((step, total))

    return Penalised(r=2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_penalty_is_added_once_per_step(tmp_path, accumulation) -> None:
    def first_loss(weight: float) -> float:
        run = trainer(
            tmp_path / str(weight),
            penalised(weight),
            max_steps=1,
            gradient_accumulation_steps=accumulation,
        )
        expected = sum(p.square().sum().item() for p in gt.adapters(run.model)["task"].parameters())
        run.train()
        return curve(run)[0][1] - weight * expected

    assert first_loss(1.0) == pytest.approx(first_loss(0.0), abs=1e-4)


def own_forward(model: Any, batch: dict[str, Any]) -> Any:
    """The model's outputs, the loss computed outside it."""
    labels = batch.pop("labels")
    logits = model(**batch).logits
    return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_forward_of_ones_own_trains_as_the_models(tmp_path, accumulation) -> None:
    def run_with(forward: Any) -> Trainer:
        run = trainer(
            tmp_path / str(forward is None),
            penalised(0.1),
            forward=forward,
            max_steps=4,
            gradient_accumulation_steps=accumulation,
            eval_dataset=examples(6),
        )
        run.loss_is_scaled_for_ga = False  # BERT's loss is a mean, though it takes any keyword
        run.train()
        return run

    ours, theirs = run_with(own_forward), run_with(None)
    assert_equal(tensors(ours), tensors(theirs))
    assert curve(ours) == curve(theirs)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"])


def test_a_forward_of_ones_own_is_diagnosed(tmp_path) -> None:
    run = trainer(tmp_path, forward=own_forward)
    with torch.no_grad():
        run.model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r'layer\.1\.output\.dense" is the first module'):
        run.train()


def test_no_penalty_in_evaluation(tmp_path) -> None:
    plain = trainer(tmp_path, penalised(0.0), eval_dataset=examples(6)).evaluate()
    other = trainer(tmp_path, penalised(9.0), eval_dataset=examples(6)).evaluate()
    assert plain["eval_loss"] == other["eval_loss"]


def test_schedules_advance_at_each_optimizer_step(tmp_path) -> None:
    method = penalised(0.0)
    type(method).seen.clear()
    trainer(tmp_path, method, max_steps=3, gradient_accumulation_steps=2).train()
    assert type(method).seen == [(1, 3), (2, 3), (3, 3)]


def test_a_method_sets_learning_rates(tmp_path) -> None:
    class Plus(gt.LoRA):
        def param_groups(self, adapter: Any, lr: float) -> list[dict[str, Any]]:
            named = dict(adapter.named_parameters())
            return [{"params": [p for n, p in named.items() if n.endswith("B")], "lr": 16 * lr}]

    run = trainer(tmp_path, Plus(r=2), weight_decay=0.1)
    optimizer = run.create_optimizer()
    fast = [g for g in optimizer.param_groups if g["lr"] == pytest.approx(0.16)]
    slow = [g for g in optimizer.param_groups if g["lr"] == pytest.approx(0.01)]
    count = sum(p.numel() for g in fast + slow for p in g["params"])
    assert count == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert fast
    assert slow
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    grouping = (dict, {"params": []})
    run = trainer(tmp_path, Plus(r=2), optimizer_cls_and_kwargs=grouping)
    with pytest.raises(TrainingError, match="sets its own learning rates"):
        run.create_optimizer()


def test_a_head_learns_at_its_own_rate(tmp_path) -> None:
    run = trainer(tmp_path, gt.LoRA(r=2, lr_ratio=4), head_lr=0.5, weight_decay=0.1)
    rates = {id(p): g["lr"] for g in run.create_optimizer().param_groups for p in g["params"]}
    adapter = gt.adapters(run.model)["task"]
    assert adapter.head_names == ("classifier",)
    assert len(rates) == len(list(adapter.parameters()))
    for name, parameter in adapter.named_parameters():
        wanted = 0.5 if name.startswith("classifier.") else 0.04 if name.endswith("B") else 0.01
        assert rates[id(parameter)] == pytest.approx(wanted), name


def test_a_head_of_a_model_that_trains_in_place_has_its_own_rate(tmp_path) -> None:
    run = trainer(tmp_path, gt.FullFineTuning(), head_lr=0.5)
    fast = [g for g in run.create_optimizer().param_groups if g["lr"] == pytest.approx(0.5)]
    wanted = [p for n, p in run.model.named_parameters() if n.startswith("classifier.")]
    assert {id(p) for g in fast for p in g["params"]} == {id(p) for p in wanted}


def test_a_rate_for_a_head_that_doesnt_train_is_refused(tmp_path) -> None:
    run = trainer(tmp_path, gt.LoRA(r=2, train_head=False), head_lr=0.5)
    with pytest.raises(TrainingError, match=r"head_lr is 0\.5, but no head trains"):
        run.create_optimizer()


def test_lora_plus_trains_b_faster(tmp_path) -> None:
    run = trainer(tmp_path, gt.LoRA(r=2, lr_ratio=16), max_steps=1, warmup_steps=0, optim="sgd")
    rates = {id(p): g["lr"] for g in run.create_optimizer().param_groups for p in g["params"]}
    for name, tensor in gt.adapters(run.model)["task"].named_parameters():
        assert rates[id(tensor)] == pytest.approx(0.16 if name.endswith(".B") else 0.01), name
    run.train()


@pytest.mark.parametrize("method", [gt.LoRA(r=2, dora=True), gt.BitFit(), gt.FullFineTuning()])
def test_only_matrices_decay(tmp_path, method) -> None:
    optimizer = trainer(tmp_path, method, weight_decay=0.1).create_optimizer()
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_examples_of_like_length_share_a_batch(tmp_path) -> None:
    run = trainer(tmp_path)
    spread = [batch["attention_mask"].float().mean().item() for batch in run.get_train_dataloader()]
    other = trainer(tmp_path, group_by_length=False)
    usual = [b["attention_mask"].float().mean().item() for b in other.get_train_dataloader()]
    assert sum(spread) > sum(usual)


def test_the_base_stays_bit_for_bit(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.train()
    base = dict(tiny().named_parameters())
    for name, parameter in run.model.named_parameters():
        if name in base and not name.startswith("classifier"):
            assert torch.equal(parameter, base[name]), name


def test_saving_the_model_writes_the_adapter_and_keeps_what_lies_there(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.train()
    run.save_model()
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    gt.load(tiny(), tmp_path, name="back")


def test_the_stock_trainer_trains_and_writes_the_adapter_only(tmp_path) -> None:
    from graftune.training.lengths import PadToLongest

    model = tiny()
    gt.attach(model, gt.LoRA(r=2), name="task", seed=0)
    run = transformers.Trainer(
        model=model,
        args=args(tmp_path, max_steps=4),
        train_dataset=examples(),
        data_collator=PadToLongest(0),
    )
    run.train()
    assert curve(run)[-1][0] == 4
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.startswith("model") for name in names)


def test_a_bare_loop_trains(tmp_path) -> None:
    from graftune.training.lengths import PadToLongest

    model = tiny(dropout=0.0)
    adapter = gt.attach(model, gt.LoRA(r=4), name="task", seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    batch = PadToLongest(0)(examples(12))
    losses: list[float] = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(math.isfinite(loss) for loss in losses)


def test_accelerate_prepares_an_attached_model() -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from graftune.training.lengths import PadToLongest

    model = tiny(dropout=0.0)
    adapter = gt.attach(model, gt.LoRA(r=4), name="task", seed=0)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    loader = DataLoader(examples(12), batch_size=4, collate_fn=PadToLongest(0))  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for _ in range(8):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    assert gt.adapters(accelerator.unwrap_model(model))["task"] is adapter
