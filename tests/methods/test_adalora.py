"""AdaLoRA: its penalty and schedule, what is left at the end, and what it refuses and shows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import graftune as gt
from graftune.errors import FormatError, SettingsError, TrainingError
from graftune.methods._triplets import allocate
from graftune.methods.adalora import Schedule, triplets_of
from graftune.training import Trainer, training_args
from graftune.training.lengths import PadToLongest
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.adalora import SMALL, STEPS, attached, budget, kept, step_on
from tests.training.models import examples, tiny

# The penalty


@pytest.mark.parametrize("form", ["released", "paper"])
def test_penalty_is_the_distance_from_orthonormal(form: Any) -> None:
    _, adapter = attached(orthogonal=0.3, orthogonal_form=form, targets="query")
    far = []
    for one in triplets_of(adapter):
        P, Q = one.P.detach(), one.Q.detach()
        far += [(P.T @ P - torch.eye(4)).norm(), (Q @ Q.T - torch.eye(4)).norm()]
    squares = [value**2 for value in far]
    expected = sum(far) / len(far) if form == "released" else sum(squares)
    torch.testing.assert_close(adapter.penalty(), 0.3 * torch.as_tensor(expected))


def test_penalty_of_experts_counts_each() -> None:
    _, adapter = attached("mixtral", targets="ffn", orthogonal=1.0)
    far = []
    for one in triplets_of(adapter):
        for P, Q in zip(one.P.detach(), one.Q.detach(), strict=True):
            far += [(P.T @ P - torch.eye(4)).norm(), (Q @ Q.T - torch.eye(4)).norm()]
    torch.testing.assert_close(adapter.penalty(), torch.stack(far).mean())


def test_penalty_falls_in_training_and_is_none_without_a_weight() -> None:
    model, adapter = attached(orthogonal=1.0)
    before = adapter.penalty()
    step_on(model, adapter, 8)
    assert adapter.penalty() < 0.9 * before
    assert attached(orthogonal=0.0)[1].penalty() == 0.0


# The schedule


def test_budget_is_a_cubic_from_first_to_last() -> None:
    schedule = Schedule(total=100, tinit=20, tfinal=30, delta_t=10)
    curve = [schedule.budget(step, 60, 40) for step in range(1, 101)]
    assert curve[:20] == [60] * 20
    assert curve[69:] == [40] * 31
    assert all(a >= b for a, b in itertools.pairwise(curve))
    assert curve[44] == int(40 + 20 * (1 - 25 / 50) ** 3)
    at = [step for step in range(1, 101) if schedule.allocates(step)]
    assert at == [30, 40, 50, 60, 70]
    assert [s for s in range(1, 101) if Schedule(100, 20, 25, 10).allocates(s)][-1] == 75


@pytest.mark.parametrize(
    ("given", "total", "expected"),
    [
        ({}, 1000, (100, 450, 4)),
        ({}, 10, (1, 4, 1)),
        ({}, 2, (0, 1, 1)),
        ({}, 1, (0, 0, 1)),
        ({"tinit": 0, "tfinal": 0, "delta_t": 1}, 50, (0, 0, 1)),
        ({"tinit": 40}, 50, (40, 5, 1)),
        ({"tfinal": 45}, 50, (0, 45, 1)),
    ],
)
def test_schedule_left_open_is_shares_of_the_run(
    given: dict[str, int], total: int, expected: tuple[int, int, int]
) -> None:
    assert gt.AdaLoRA(**given).schedule(total) == Schedule(total, *expected)


@pytest.mark.parametrize("given", [{"tinit": 50}, {"tfinal": 60}, {"tinit": 30, "tfinal": 20}])
def test_a_schedule_without_a_step_to_prune_in_is_refused(given: dict[str, int]) -> None:
    _, adapter = attached(**given)
    with pytest.raises(SettingsError, match="leave none of the run's 50 optimizer steps"):
        adapter.begin(50)


# The end


def test_finished_it_holds_its_budget_and_computes_the_same() -> None:
    model, adapter = attached()
    step_on(model, adapter, STEPS)
    expected = logits(model, FAMILIES["bert"].inputs())
    assert kept(adapter) == budget(adapter) == 24
    adapter.finish()
    pattern = adapter.method.rank_pattern  # type: ignore[attr-defined]
    assert sum(pattern.values()) == 24
    assert {one.rank for one in triplets_of(adapter)} == set(pattern.values())
    torch.testing.assert_close(logits(model, FAMILIES["bert"].inputs()), expected)
    assert adapter.state_dict(training=True).keys() == adapter.state_dict().keys()
    assert all(tensor.requires_grad for tensor in adapter.parameters())
    before = adapter.state_dict()
    adapter.finish()
    assert adapter.state_dict().keys() == before.keys()
    head = sum(tensor.numel() for tensor in FAMILIES["bert"].build().classifier.parameters())
    assert adapter.count() == adapter.method.count(model, adapter.anatomy) + head


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 11])
def test_a_run_cut_short_ends_at_the_budget_too(steps: int) -> None:
    model, adapter = attached()
    step_on(model, adapter, steps)
    adapter.finish()
    assert sum(adapter.method.rank_pattern.values()) == 24  # type: ignore[attr-defined]


def test_weights_put_back_from_before_the_last_pruning_are_pruned_too() -> None:
    model, adapter = attached()
    step_on(model, adapter, 4)
    best = {name: t.clone() for name, t in adapter.state_dict(training=True).items()}
    step_on(model, adapter, STEPS - 4, first=5)
    adapter.load_state_dict(best)
    assert kept(adapter) > 24
    adapter.finish()
    assert sum(adapter.method.rank_pattern.values()) == 24  # type: ignore[attr-defined]


def test_without_ranks_to_prune_it_only_fixes_them() -> None:
    model, adapter = attached(target_r=4)
    step_on(model, adapter, STEPS)
    expected = logits(model, FAMILIES["bert"].inputs())
    adapter.finish()
    assert set(adapter.method.rank_pattern.values()) == {4}  # type: ignore[attr-defined]
    assert torch.equal(logits(model, FAMILIES["bert"].inputs()), expected)


def test_experts_are_pruned_each_by_its_own() -> None:
    model, adapter = attached("mixtral", targets="ffn")
    found = triplets_of(adapter)
    generator = torch.Generator().manual_seed(0)
    for one in found:
        nn.init.ones_(one.Lambda)
        for name in ("sensitivity_Lambda", "uncertainty_Lambda"):
            one.get_buffer(name).copy_(torch.rand(one.Lambda.shape, generator=generator))
    shake(adapter, seed=1)
    allocate(found, budget(adapter))
    inputs = FAMILIES["mixtral"].inputs()
    expected, ranks = logits(model, inputs), [one.is_kept.sum(-1).tolist() for one in found]
    adapter.finish()
    assert kept(adapter) == budget(adapter)
    assert any(len(set(several)) > 1 for several in ranks)
    assert [(one.Lambda != 0).sum(-1).tolist() for one in found] == ranks
    torch.testing.assert_close(logits(model, inputs), expected)
    for one in found:
        assert one.rank == one.Lambda.shape[-1] == one.P.shape[-1] == one.Q.shape[-2]


def test_a_finished_adapter_is_settings_and_tensors_alone(tmp_path: Path) -> None:
    model, adapter = attached()
    step_on(model, adapter, STEPS)
    lost, *others = triplets_of(adapter)
    moved = int(lost.is_kept.sum())
    lost.is_kept.fill_(False)
    for one in others:  # its triplets go to others
        free = (~one.is_kept).nonzero().flatten()[:moved]
        one.is_kept[free] = True
        moved -= len(free)
    adapter.finish()
    adapter.save(tmp_path / "task")
    again = FAMILIES["bert"].build()
    loaded = gt.load(again, tmp_path / "task")
    ranks = loaded.method.rank_pattern  # type: ignore[attr-defined]
    assert ranks == adapter.method.rank_pattern  # type: ignore[attr-defined]
    assert 0 in ranks.values()
    assert {site.place for site in gt.summary(again).sites if site.changed == 0} == {
        name for name, rank in ranks.items() if rank == 0
    }
    inputs = FAMILIES["bert"].inputs()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    gt.merge(again, "task")
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs))


def test_a_finished_adapter_trains_on_at_its_ranks() -> None:
    model, adapter = attached()
    step_on(model, adapter, STEPS)
    adapter.finish()
    shapes = {name: t.shape for name, t in adapter.named_parameters()}
    adapter.total_steps = None
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    before = logits(model.eval(), FAMILIES["bert"].inputs())
    (model.train()(**FAMILIES["bert"].inputs()).logits.pow(2).mean() + adapter.penalty()).backward()
    optimizer.step()
    adapter.begin(1)
    adapter.advance(1)
    assert not torch.equal(logits(model.eval(), FAMILIES["bert"].inputs()), before)
    assert {name: t.shape for name, t in adapter.named_parameters()} == shapes


# In the loops


def arguments(folder: Path, **settings: Any) -> Any:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "disable_tqdm": True}
    more = {"use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}
    return training_args(folder, **(given | more | settings))


def by_ours(model: Any, folder: Path, **settings: Any) -> Any:
    run = Trainer(model, arguments(folder, **settings), train_dataset=examples())
    run.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return run


def by_the_stock_one(model: Any, folder: Path) -> None:
    given, collate = arguments(folder), PadToLongest(0)
    calls = [gt.AdapterCallback()]
    transformers.Trainer(model, given, collate, train_dataset=examples(), callbacks=calls).train()


def by_hand(model: Any, folder: Path) -> None:
    adapter = gt.adapters(model)["task"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.begin(STEPS)
    model.train()
    rows, collate = examples(), PadToLongest(0)
    for step in range(1, STEPS + 1):
        start = 4 * ((step - 1) % 6)
        (model(**collate(rows[start : start + 4])).loss + adapter.penalty()).backward()
        optimizer.step()
        adapter.advance(step)
        optimizer.zero_grad()
    adapter.finish()


LOOPS = {"ours": by_ours, "stock": by_the_stock_one, "by hand": by_hand}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_every_loop_ends_at_the_budget_and_learns(loop: Any, tmp_path: Path) -> None:
    model = tiny(dropout=0.0)
    adapter = gt.attach(model, gt.AdaLoRA(**SMALL), name="task", seed=0)
    batch = PadToLongest(0)(examples())
    before = loss_of(model, batch)
    loop(model, tmp_path)
    assert sum(adapter.method.rank_pattern.values()) == 24  # type: ignore[attr-defined]
    assert loss_of(model, batch) < before - 0.1


def loss_of(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(**batch).logits, batch["labels"]))


def test_training_that_calls_nothing_is_refused() -> None:
    model, _ = attached()
    with pytest.raises(
        TrainingError, match=r"AdaLoRA has a penalty or a schedule.*AdapterCallback"
    ):
        model.train()(**FAMILIES["bert"].inputs())


@pytest.mark.parametrize("step", [3, 9], ids=["falling", "fixed"])
def test_a_resumed_run_equals_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    found = []
    for number in range(2):
        model = tiny()
        adapter = gt.attach(model, gt.AdaLoRA(**SMALL, dropout=0.1), name="task", seed=0)
        run = Trainer(
            model,
            arguments(tmp_path / str(number), save_strategy="steps", save_steps=step),
            train_dataset=examples(),
        )
        checkpoint = str(tmp_path / "0" / f"checkpoint-{step}") if number else None
        run.train(resume_from_checkpoint=checkpoint)
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        found.append((adapter.method, adapter.state_dict(), losses))
    (method, whole, losses), (again, resumed, more) = found
    assert again == method
    assert more == losses
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


# What is refused, and what is shown


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 4}, r"target_r is 8, expected at most r, which is 4"),
        ({"r": 0}, "r is 0, expected at least 1"),
        ({"target_r": 0}, "target_r is 0, expected at least 1"),
        ({"beta1": 1.0}, "beta1 is 1.0, expected between 0 and 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"orthogonal": -1.0}, "orthogonal is -1.0, expected at least 0"),
        ({"delta_t": 0}, "delta_t is 0, expected at least 1"),
        ({"tinit": -1}, "tinit is -1, expected at least 0"),
        ({"orthogonal_form": "papr"}, "expected one of released, paper.*paper"),
        ({"scale_form": "paper", "alpha": 3.0}, "a scale of 1: leave alpha out"),
        ({"rank_pattern": {"x": 13}}, r'rank_pattern\["x"\] is 13, expected between 0 and r'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.AdaLoRA(**settings)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_attached() -> None:
    for family, settings, words in [
        ("bert", {"r": 64, "target_r": 8}, "r is 64, but bert.encoder.*set a smaller r"),
        ("mixtral", {**SMALL, "dropout": 0.1}, 'on which dropout is not possible.*"attention"'),
        ("bert", {"rank_pattern": {"layer.0.query": 2}}, "is none of the 12 targets"),
    ]:
        model = FAMILIES[family].build()
        with pytest.raises(SettingsError, match=words):
            gt.attach(model, gt.AdaLoRA(**settings))
        assert gt.adapters(model) == {}


def test_a_file_of_other_ranks_is_refused(tmp_path: Path) -> None:
    model, adapter = attached()
    step_on(model, adapter, STEPS)
    adapter.finish()
    adapter.save(tmp_path / "task")
    own = tmp_path / "task" / "graftune.json"
    name = next(iter(adapter.method.rank_pattern))  # type: ignore[attr-defined]
    own.write_text(own.read_text().replace(f'"{name}"', f'"{name}x"'))
    with pytest.raises(FormatError, match="rank_pattern names"):
        gt.load(FAMILIES["bert"].build(), tmp_path / "task")


def test_the_map_shows_the_rank_of_each_matrix_by_block() -> None:
    model, adapter = attached(targets=("query", "value", "word_embeddings"))
    shown = adapter.method.heat_maps(adapter)[0]
    assert shown.columns == ("0", "1", "outside")
    assert shown.rows == (
        "bert.embeddings.word_embeddings", "attention.self.query", "attention.self.value",
    )  # fmt: skip
    assert shown.values == ((None, None, 4.0), (4.0, 4.0, None), (4.0, 4.0, None))
    step_on(model, adapter, STEPS)
    adapter.finish()
    shown = adapter.method.heat_maps(adapter)[0]
    assert sum(value or 0 for row in shown.values for value in row) == 10


def test_the_map_of_two_stacks_names_them() -> None:
    _, adapter = attached("t5", targets=("query",))
    shown = adapter.method.heat_maps(adapter)[0]
    assert shown.columns == ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
    assert shown.rows == ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q")
    assert shown.values[1] == (None, None, 4.0, 4.0)


def test_the_map_of_experts_is_their_mean() -> None:
    _, adapter = attached("mixtral", targets="ffn")
    one = triplets_of(adapter)[0]
    one.is_kept[0] = False
    experts = len(one.is_kept)
    shown = adapter.method.heat_maps(adapter)[0]
    assert shown.values[0][0] == pytest.approx(4 * (experts - 1) / experts)
