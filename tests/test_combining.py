"""Combining adapters in their parameters: each way against its equation, and what can't be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graftune as gt
from graftune.combining import HOW
from graftune.errors import AdapterError, SettingsError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def model_with(family: str = "llama", **methods: Any) -> nn.Module:
    model = FAMILIES[family].build()
    chosen = methods or {"a": gt.LoRA(r=4, alpha=8), "b": gt.LoRA(r=4, alpha=8)}
    for seed, (name, method) in enumerate(chosen.items()):
        shake(gt.attach(model, method, name, seed=seed), seed, 0.2)
    return model


def state(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return gt.adapters(model)[name].state_dict()


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(
    "method",
    [gt.LoRA(r=4), gt.PfeifferAdapter(reduction=8), gt.IA3(), gt.LayerNormTuning(), gt.LoHa(r=2)],
    ids=lambda method: method.name,
)
def test_linear_is_the_weighted_sum_of_changes(family: str, method: Any) -> None:
    model = model_with(family, a=method, b=method)
    gt.combine(model, ["a", "b"], "c", weights=[0.75, -0.5])
    base = dict(model.named_parameters())
    for name, made in state(model, "c").items():
        one, two = state(model, "a")[name], state(model, "b")[name]
        start = base[name] if name in base else torch.zeros_like(one)
        assert torch.allclose(made, start + 0.75 * (one - start) - 0.5 * (two - start), atol=1e-6)
    logits(model, FAMILIES[family].inputs())
    gt.activate(model, None)
    gt.detach(model, "c")


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_cat_is_the_average_of_what_they_answer(family: str) -> None:
    methods = {"a": gt.LoRA(r=4, alpha=8), "b": gt.LoRA(r=3, alpha=2, rslora=True)}
    model, inputs = model_with(family, **methods), FAMILIES[family].inputs()
    made = gt.combine(model, ["a", "b"], "c", how="cat", weights=[0.6, 0.3])
    assert made.method.r == 7
    out = logits(model, inputs)
    with gt.using(model, gt.Average("a", "b", weights=[0.6, 0.3])):
        assert torch.allclose(out, logits(model, inputs), atol=1e-5)


def test_svd_is_cat_at_full_rank_and_the_best_below() -> None:
    model, inputs = model_with(), FAMILIES["llama"].inputs()
    gt.combine(model, ["a", "b"], "cat", how="cat")
    whole = logits(model, inputs)
    gt.combine(model, ["a", "b"], "svd", how="svd", r=8)
    assert torch.allclose(logits(model, inputs), whole, atol=1e-4)
    small = gt.combine(model, ["a", "b"], "two", how="svd", r=2)
    for graft, full in zip(small.grafts, gt.adapters(model)["cat"].grafts, strict=True):
        target = full.delta.weight_change().detach()
        U, S, V = torch.linalg.svd(target)
        best = (U[:, :2] * S[:2]) @ V[:2]
        assert torch.allclose(graft.delta.weight_change(), best, atol=1e-5)


def test_ties_elects_signs_entry_by_entry() -> None:
    model = model_with("bert", **{name: gt.BitFit(train_head=False) for name in "abc"})
    values = {"a": [4.0, -1.0, 3.0, 0.1], "b": [2.0, -3.0, -5.0, 0.2], "c": [-1.0, 5.0, 1.0, 6.0]}
    name, base = next(
        (n, p.detach().clone()) for n, p in model.named_parameters() if n.endswith("query.bias")
    )
    for member, row in values.items():
        change = torch.zeros_like(base)
        change[:4] = torch.tensor(row)
        state(model, member)[name].copy_(base + change)
    gt.combine(model, ["a", "b", "c"], "d", how="ties", density=3 / 32)
    # Trimmed to three: a 4 -1 3 0, b 2 -3 -5 0 (0.2 goes), c 0 5 1 6 or -1 among equals.
    made = (state(model, "d")[name] - base)[:4]
    one, two = torch.tensor([4.0, -1, 3, 0]), torch.tensor([2.0, -3, -5, 0])
    trimmed = torch.stack([one, two, torch.tensor([-1.0, 5, 0, 6])])
    other = torch.stack([one, two, torch.tensor([0.0, 5, 1, 6])])
    assert any(torch.allclose(made, by_hand(rows), atol=1e-5) for rows in (trimmed, other))


def by_hand(rows: torch.Tensor) -> torch.Tensor:
    found = []
    for column in rows.t().tolist():
        sign = 1 if sum(column) > 0 else -1
        agree = [value for value in column if value * sign > 0]
        found.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(found)


@pytest.mark.parametrize("how", ["dare", "dare-ties"])
def test_dare_drops_and_scales_up_by_its_seed(how: str) -> None:
    model = model_with()
    first = gt.combine(model, ["a", "b"], "c", how=how, density=0.25, seed=3).state_dict()
    again = gt.combine(model, ["a", "b"], "d", how=how, density=0.25, seed=3).state_dict()
    other = gt.combine(model, ["a", "b"], "e", how=how, density=0.25, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    whole = torch.cat([tensor.flatten() for tensor in first.values()])
    zeros = (whole == 0).float().mean().item()
    assert zeros == pytest.approx(0.75**2, abs=0.03)
    if how == "dare":
        mine = torch.cat([tensor.flatten() for tensor in state(model, "a").values()])
        theirs = torch.cat([tensor.flatten() for tensor in state(model, "b").values()])
        allowed = torch.stack([0 * mine, 2 * mine, 2 * theirs, 2 * mine + 2 * theirs])
        assert ((whole - allowed).abs().min(0).values < 1e-5).all()


def test_density_one_of_dare_is_linear() -> None:
    model = model_with()
    linear = gt.combine(model, ["a", "b"], "c").state_dict()
    dare = gt.combine(model, ["a", "b"], "d", how="dare", density=1.0).state_dict()
    assert all(torch.allclose(dare[name], linear[name]) for name in linear)


def test_the_new_one_is_an_adapter_like_any(tmp_path: Any) -> None:
    model, inputs = model_with(), FAMILIES["llama"].inputs()
    gt.combine(model, ["a", "b"], "c", how="cat").save(tmp_path / "c")
    expected = logits(model, inputs)
    fresh = FAMILIES["llama"].build()
    gt.load(fresh, tmp_path / "c", name="c")
    assert torch.allclose(logits(fresh, inputs), expected, atol=1e-6)
    before = state(model, "a")
    gt.detach(model, "a")
    assert torch.equal(logits(model, inputs), expected)
    assert before


@pytest.mark.parametrize(
    ("members", "options", "words"),
    [
        (["a"], {}, "takes two or more different adapters"),
        (["a", "a"], {}, "takes two or more different adapters"),
        ("ab", {}, "takes two or more different adapters"),
        (["a", "x"], {}, 'No adapter is named "x"'),
        (["a", "ia3"], {}, '"a" of LoRA and "ia3" of IA3: gt.Average mixes'),
        (["a", "big"], {}, '"a" and "big" can\'t be combined: .*A is \\(4, .*and \\(8,'),
        (["a", "qv"], {"how": "cat"}, "can't be combined: not all of them change"),
        (["a", "dora"], {"how": "cat"}, '"dora" has more than A and B'),
        (["ia3", "two"], {"how": "svd"}, 'how="svd" is for LoRA, found IA3'),
    ],
)
def test_what_can_not_be_combined_changes_nothing(
    members: Any, options: dict[str, Any], words: str
) -> None:
    model = model_with(
        a=gt.LoRA(r=4),
        big=gt.LoRA(r=8),
        qv=gt.LoRA(r=4, targets="qv"),
        dora=gt.LoRA(r=4, dora=True),
        ia3=gt.IA3(),
        two=gt.IA3(),
    )
    before = list(gt.adapters(model))
    with pytest.raises(AdapterError, match=words):
        gt.combine(model, members, "new", **options)
    assert list(gt.adapters(model)) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"how": "tie"}, f"expected one of {', '.join(HOW)}. Did you mean .ties"),
        ({"weights": [1.0]}, "expected a finite number for each of 2 members"),
        ({"weights": [1.0, float("nan")]}, "expected a finite number"),
        ({"how": "ties", "density": 0.0}, "density is 0.0, expected more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.combine(model_with(), ["a", "b"], "new", **options)
