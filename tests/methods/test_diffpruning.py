"""Diff pruning: gates, their penalty, the three stages of a run, and the sparse form it ends in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError, TrainingError
from graftune.methods._gates import EDGE, GatedChange, Gates
from graftune.methods._sparse import SparseChange
from graftune.training import Trainer, training_args
from graftune.training.lengths import PadToLongest
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.training.models import examples, tiny

INPUTS = FAMILIES["bert"].inputs()
STEPS = 8


def gated(adapter: Any) -> list[GatedChange]:
    return [g.delta for g in adapter.grafts if isinstance(g.delta, GatedChange)]


def sparse(adapter: Any) -> list[SparseChange]:
    return [g.delta for g in adapter.grafts if isinstance(g.delta, SparseChange)]


def changes(adapter: Any) -> list[Tensor]:
    """Returns the differences from the base, flat, without noise."""
    return [delta.change().flatten().clone() for delta in gated(adapter)]


def attached(family: str = "bert", seed: int = 1, **settings: Any) -> tuple[Any, Any]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, gt.DiffPruning(**settings), "task", seed=seed)
    shake(adapter, seed)
    return model, adapter


def made(shape: tuple[int, ...] = (3, 4), *, group: bool = True, **gates: float) -> GatedChange:
    draw = torch.Generator().manual_seed(0)
    settings = {"lower": -1.5, "upper": 1.5, "temperature": 1.0} | gates
    w, alpha = (torch.randn(shape, generator=draw) for _ in range(2))
    return GatedChange(w, alpha, torch.tensor(0.3) if group else None, Gates(**settings))


def slow_gate(alpha: float, u: float | None, low: float, high: float, tau: float) -> float:
    """The equation, in Python's numbers."""
    x = alpha if u is None else (math.log(u) - math.log(1 - u) + alpha) / tau
    return min(1.0, max(0.0, (high - low) / (1 + math.exp(-x)) + low))


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("tau", [1.0, 2 / 3])
@pytest.mark.parametrize("noisy", [True, False])
def test_the_change_is_the_equation(group: bool, tau: float, noisy: bool) -> None:
    delta = made(group=group, lower=-0.1, upper=1.1, temperature=tau).train(noisy)
    delta.begin_forward()
    base = torch.randn(3, 4)
    draw = torch.Generator().manual_seed(delta.seed)
    u = torch.rand(3, 4, generator=draw).clamp(EDGE, 1 - EDGE)
    u_group = torch.rand((), generator=draw).clamp(EDGE, 1 - EDGE)
    z_group = slow_gate(0.3, u_group.item() if noisy else None, -0.1, 1.1, tau) if group else 1.0
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        noise = u[i, j].item() if noisy else None
        z = slow_gate(delta.alpha[i, j].item(), noise, -0.1, 1.1, tau)
        expected = base[i, j].item() + z_group * z * delta.w[i, j].item()
        assert delta(base, base)[i, j].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gradients_are_those_of_the_equation(group: bool, tau: float) -> None:
    delta = made(group=group, temperature=tau).double().train()
    delta.begin_forward()
    base = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    tensors = [base, *delta.parameters()]
    assert torch.autograd.gradcheck(lambda *_: delta(base, base), tensors, atol=1e-6)


def test_without_noise_gradients_are_those_of_the_equation_too() -> None:
    delta = made(temperature=0.5).double().eval()
    base = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: delta(base, base), list(delta.parameters()))


def test_a_clamped_gate_has_no_slope() -> None:
    delta = GatedChange(torch.ones(4), torch.tensor([-9.0, 9.0, 0.2, 1.0]), None, made().gates)
    delta.eval()
    delta(torch.zeros(4), None).sum().backward()
    assert (delta.alpha.grad == 0).tolist() == [True, True, False, False]
    assert torch.equal(delta.w.grad, delta.gates.opened(delta.alpha.detach()))
    assert delta.w.grad.tolist()[:2] == [0.0, 1.0]


@pytest.mark.parametrize(("low", "high", "tau"), [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3)])
@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.0, 3.0])
def test_the_expected_share_of_open_gates_is_what_sampling_finds(
    alpha: float, low: float, high: float, tau: float
) -> None:
    gates = Gates(low, high, tau)
    delta = GatedChange(torch.ones(40_000), torch.full((40_000,), alpha), None, gates).train()
    torch.manual_seed(0)
    delta.begin_forward()
    found = (delta(torch.zeros(40_000), None) > 0).float().mean().item()
    assert delta.expected()[0].item() / 40_000 == pytest.approx(found, abs=1e-2)


def test_symmetric_gates_are_compared_with_zero() -> None:
    assert gt.DiffPruning().gates.offset == 0.0
    assert Gates(-0.1, 1.1, 2 / 3).offset == pytest.approx(2 / 3 * math.log(0.1 / 1.1))


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_the_penalty_is_the_forms_sum(structured: bool, form: str) -> None:
    _, adapter = attached(structured=structured, l0_form=form, l0_weight=0.25)
    expected = 0.0
    for delta in gated(adapter):
        entries = torch.sigmoid(delta.alpha.double()).sum().item()
        group = torch.sigmoid(delta.group.double()).item() if structured else None
        product = entries if group is None else entries * group
        expected += product if form == "paper" or group is None else entries + group
    adapter.begin(STEPS)
    penalty = adapter.penalty()
    assert penalty.item() == pytest.approx(0.25 * expected, rel=1e-5)
    penalty.backward()
    assert all(
        torch.isfinite(d.alpha.grad).all() and d.alpha.grad.min() > 0 for d in gated(adapter)
    )
    assert all(delta.w.grad is None for delta in gated(adapter))


def test_it_starts_as_the_base_whatever_the_gates_are() -> None:
    model = FAMILIES["bert"].build()
    base = logits(model, INPUTS)
    adapter = gt.attach(model, gt.DiffPruning(alpha_init=0.5))
    adapter.begin(STEPS)
    assert {delta.alpha.unique().item() for delta in gated(adapter)} == {0.5}
    for _ in range(2):
        assert torch.equal(logits(model.train(), INPUTS), base)
    assert torch.equal(logits(model.eval(), INPUTS), base)


def test_a_pass_of_the_model_draws_noise_once_and_the_next_anew() -> None:
    model, adapter = attached("gpt2")
    adapter.begin(STEPS)
    inputs = FAMILIES["gpt2"].inputs()
    table = model.transformer.wte
    seen: list[Tensor] = []
    for host in (table, model.lm_head):
        host.register_forward_pre_hook(lambda host, _: seen.append(host.weight.clone()))
    model.train()
    for _ in range(2):
        logits(model, inputs)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
    torch.manual_seed(3)
    first = logits(model, inputs)
    torch.manual_seed(3)
    assert torch.equal(logits(model, inputs), first)
    assert torch.equal(logits(model.eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("keep", [0.005, 0.05, 1.0])
def test_the_largest_differences_of_the_whole_model_are_kept(keep: float) -> None:
    model, adapter = attached(keep=keep)
    before = torch.cat(changes(adapter))
    count = math.floor(keep * len(before))
    adapter.finish()
    found = [delta.values.detach() for delta in sparse(adapter)]
    assert sum(map(len, found)) == count == sum(d.changes(0) for d in sparse(adapter))
    kept = torch.cat(found)
    assert kept.abs().min() >= before.abs().topk(count).values[-1]
    assert set(kept.tolist()) <= set(before.tolist())
    head = sum(p.numel() for n, p in adapter.named_parameters() if n.startswith("classifier"))
    assert gt.summary(model).trainable == count + head
    assert gt.summary(model).changed == count + head


def test_equal_differences_are_kept_exactly_as_many() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.DiffPruning(keep=0.01))
    total = sum(delta.w.numel() for delta in gated(adapter))
    adapter.finish()
    assert sum(len(delta.values) for delta in sparse(adapter)) == total // 100


def test_finishing_twice_changes_nothing_and_needs_no_steps_after() -> None:
    model, adapter = attached()
    assert adapter.method.needs_steps(adapter)
    adapter.finish()
    expected, names = logits(model, INPUTS), list(adapter.state_dict())
    adapter.finish()
    assert torch.equal(logits(model, INPUTS), expected)
    assert list(adapter.state_dict()) == names
    assert not adapter.method.needs_steps(adapter)
    assert adapter.penalty() == 0.0
    adapter.total_steps = None
    logits(model.train(), INPUTS)


def test_fixed_gates_answer_alike_in_training_and_before_and_after_finish() -> None:
    model, adapter = attached(keep=0.05)
    adapter.begin(2)
    adapter.advance(1)
    expected = logits(model, INPUTS)
    assert torch.equal(logits(model.train(), INPUTS), expected)
    model.eval()
    adapter.finish()
    torch.testing.assert_close(logits(model, INPUTS), expected, atol=0, rtol=0)


@pytest.mark.parametrize("advanced", [False, True])
def test_an_unfinished_adapter_is_saved_and_loaded_bit_for_bit(
    advanced: bool, tmp_path: Path
) -> None:
    model, adapter = attached()
    adapter.begin(4)
    for step in range(1, 3 if advanced else 2):
        adapter.advance(step)
    assert bool(gated(adapter)[0].is_fixed) is advanced
    expected = logits(model, INPUTS)
    adapter.save(tmp_path / "a")
    fresh = FAMILIES["bert"].build()
    loaded = gt.load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh, INPUTS), expected)
    adapter.finish()
    loaded.finish()
    assert torch.equal(logits(fresh, INPUTS), logits(model, INPUTS))


def test_a_finished_adapter_merges_exactly() -> None:
    model, adapter = attached(keep=0.05)
    adapter.finish()
    expected = logits(model, INPUTS)
    gt.merge(model, "task")
    assert torch.equal(logits(model, INPUTS), expected)


def arguments(folder: Path, **settings: Any) -> Any:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "disable_tqdm": True}
    given |= {"use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2}
    return training_args(folder, **(given | settings))


class Watched(Trainer):
    """Notes the differences after each step, and the penalty."""

    def training_step(self, *args: Any, **settings: Any) -> Tensor:
        (adapter,) = self.training_adapters()
        self.__dict__.setdefault("seen", []).append((changes(adapter), adapter.penalty()))
        return super().training_step(*args, **settings)


def test_the_last_part_of_a_run_moves_what_is_kept_and_leaves_zeros_zero(tmp_path: Path) -> None:
    model = tiny()
    adapter = gt.attach(model, gt.DiffPruning(keep=0.02, fixed_share=0.5), "task", seed=1)
    run = Watched(model, arguments(tmp_path, weight_decay=0.1), train_dataset=examples(32))
    run.train()
    seen = [(torch.cat(found), penalty) for found, penalty in run.seen]
    count = math.floor(0.02 * len(seen[0][0]))
    opened = [int(found.count_nonzero()) for found, _ in seen]
    assert opened[0] == 0
    assert min(opened[1:4]) > count
    assert opened[4:] == [count] * 4
    assert all((penalty != 0.0) == (step < 4) for step, (_, penalty) in enumerate(seen))
    zero = seen[4][0] == 0
    assert all(torch.equal(found == 0, zero) for found, _ in seen[4:])
    assert not torch.equal(seen[4][0], seen[7][0])
    last = sparse(adapter)
    assert sum(len(delta.values) for delta in last) == count
    flat = torch.cat([torch.zeros(len(f)).index_add(0, d.positions(), d.values.detach())
                      for d, f in zip(last, run.seen[0][0], strict=True)])  # fmt: skip
    assert torch.equal(flat == 0, zero)
    assert run.optimizer is None


def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    def trained(folder: str, **settings: Any) -> dict[str, Tensor]:
        model = tiny()
        adapter = gt.attach(model, gt.DiffPruning(keep=0.02), "task", seed=1)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, max_steps=6)
        Trainer(model, args, train_dataset=examples(24)).train(**settings)
        return adapter.state_dict()

    whole = trained("whole")
    for at in (2, 4):  # gates, and kept entries alone
        checkpoint = tmp_path / "whole" / f"checkpoint-{at}"
        resumed = trained(f"from {at}", resume_from_checkpoint=str(checkpoint))
        assert list(whole) == list(resumed)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_it_learns() -> None:
    model = tiny(dropout=0.0)
    adapter = gt.attach(model, gt.DiffPruning(keep=0.05, train_head=False), "task", seed=1)
    batch = PadToLongest(0)(examples(8))
    steps, losses = 40, list[float]()
    adapter.begin(steps)
    optimizer = torch.optim.AdamW(adapter.method.param_groups(adapter, 2e-2))
    model.train()
    for step in range(1, steps + 1):
        loss = model(**batch).loss
        losses.append(loss.item())
        (loss + adapter.penalty()).backward()
        optimizer.step()
        adapter.advance(step)
        optimizer.zero_grad()
    adapter.finish()
    assert len(sparse(adapter)) == len(adapter.grafts)
    assert model.eval()(**batch).loss.item() < 0.5 * losses[0]


def test_nobody_to_call_the_penalty_is_a_clear_error() -> None:
    model, _ = attached()
    model.train()
    with pytest.raises(TrainingError, match=r"DiffPruning has a penalty or a schedule.*AdapterCal"):
        model(**INPUTS)


def test_alphas_learn_faster_and_do_not_decay() -> None:
    _, adapter = attached(alpha_lr=0.2)
    weights, alphas = adapter.method.param_groups(adapter, 1e-3)
    deltas = gated(adapter)
    assert weights["lr"] == 1e-3
    assert {id(p) for p in weights["params"]} == {id(d.w) for d in deltas}
    assert (alphas["lr"], alphas["weight_decay"]) == (0.2, 0.0)
    assert len(alphas["params"]) == 2 * len(deltas)


@pytest.mark.parametrize(
    ("share", "total", "gated_steps"), [(0.5, 7, 3), (0.25, 8, 6), (0.0, 1, 1), (0.9, 10, 1)]
)
def test_a_run_is_parted_as_told(share: float, total: int, gated_steps: int) -> None:
    _, adapter = attached(fixed_share=share)
    adapter.begin(total)
    fixed = []
    for step in range(1, total + 1):
        adapter.advance(step)
        fixed.append(bool(gated(adapter)[0].is_fixed))
    assert fixed.index(True) + 1 == gated_steps


@pytest.mark.parametrize(("share", "total"), [(0.5, 1), (0.01, 10), (0.99, 10)])
def test_too_few_steps_are_refused(share: float, total: int) -> None:
    with pytest.raises(SettingsError, match=f"{total} optimizer steps can't be parted"):
        gt.DiffPruning(fixed_share=share).check_steps(total)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep": 0}, "keep is 0, expected more than 0"),
        ({"keep": 1.5}, "keep is 1.5, expected between 0 and 1"),
        ({"fixed_share": 1.0}, "fixed_share is 1.0, expected less than 1"),
        ({"lower": 0.1}, "lower is 0.1, expected less than 0"),
        ({"upper": 1}, "upper is 1, expected more than 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
        ({"l0_weight": -1.0}, "l0_weight is -1.0, expected at least 0"),
        ({"l0_form": "papr"}, "released, paper.*paper"),
        ({"alpha_init": 1e3}, "alpha_init is 1000.0, expected between -100 and 100"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.DiffPruning(**wrong)


def test_targets_keep_to_their_tensors_and_the_budget_too() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.DiffPruning(keep=0.1, targets="ffn", layers=0))
    names = [graft.place.key for graft in adapter.grafts if isinstance(graft.delta, GatedChange)]
    assert len(names) == 4
    assert all(".layer.0." in name for name in names)
    total = sum(model.get_parameter(name).numel() for name in names)
    adapter.finish()
    assert sum(len(delta.values) for delta in sparse(adapter)) == total // 10
