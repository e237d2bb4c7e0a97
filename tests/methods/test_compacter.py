"""Compacter: maps of Kronecker products, held against plain sums of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods.base import Method
from graftune.methods.compacter import Compacter, KroneckerDelta
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.blocks import Placed, adapted, change, check_blocks, plainly
from tests.methods.changes import learns

SETTINGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "rank 2": {"phm_rank": 2},
    "two products": {"phm_dim": 2},
    "W whole": {"factorized_phm_W": False},
    "rule of vectors": {"factorized_phm_rule": True},
    "rules of their own": {"shared_phm_rule": False},
    "rules of their own, of vectors": {"shared_phm_rule": False, "factorized_phm_rule": True},
    "one W": {"shared_W_phm": True},
    "one W, whole": {"shared_W_phm": True, "factorized_phm_W": False},
    "rule fixed": {"learn_phm": False},
    "rules of their own, fixed": {"learn_phm": False, "shared_phm_rule": False},
}


def compacter(**settings: Any) -> Compacter:
    """Returns Compacter for the tiny models, with rules large enough to be seen."""
    return Compacter(**{"bottleneck": 8, "phm_init_range": 0.4, **settings})


def product(own: dict[str, Tensor], *names: str) -> Tensor:
    """Returns a rule or W, `(n, ., .)`, by the first of its names."""
    for name in names:
        if name in own:
            return own[name]
        if f"{name}_left" in own:
            return torch.stack(
                [left @ right for left, right in zip(own[f"{name}_left"], own[f"{name}_right"])]  # noqa: B905
            )
    raise KeyError(names)


def plain_map(own: dict[str, Tensor], which: str) -> Tensor:
    """Returns the matrix that maps column vectors, `(out, in)`, one Kronecker product at a time."""
    P, W = product(own, f"{which}_rule", "phm_rule"), product(own, which)
    total = torch.zeros(P.shape[1] * W.shape[1], P.shape[2] * W.shape[2])
    for rule, factor in zip(P, W, strict=True):
        for a in range(rule.shape[0]):
            for b in range(rule.shape[1]):
                rows = slice(a * factor.shape[0], (a + 1) * factor.shape[0])
                columns = slice(b * factor.shape[1], (b + 1) * factor.shape[1])
                total[rows, columns] += rule[a, b] * factor
    return total.t()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_block_is_the_formulas(family: str, settings: str) -> None:
    recorded, tensors = adapted(family, compacter(train_norms=False, **SETTINGS[settings]))
    shared = {name: t for rest in tensors.values() for name, t in rest.items() if name in SHARED}

    def placed_in(path: str) -> Placed:
        def placed(kind: str, h: Tensor, x: Tensor, s: Tensor, norm: Any) -> Tensor:
            if f"{path}.{kind}" not in tensors:
                return plainly(norm, x, h)
            own = {**shared, **tensors[f"{path}.{kind}"]}
            maps = {"down": plain_map(own, "down"), "up": plain_map(own, "up")}
            return plainly(norm, x, h + change({**own, **maps}, h, F.gelu))

        return placed

    check_blocks(recorded, placed_in)


SHARED = {
    *("phm_rule", "phm_rule_left", "phm_rule_right", "down", "up"),
    *("down_left", "down_right", "up_left", "up_right"),
}


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ("as published", {"phm_rule"}),
        ("rule of vectors", {"phm_rule_left", "phm_rule_right"}),
        ("rules of their own", set[str]()),
        ("one W", {"phm_rule", "down_left", "down_right", "up_left", "up_right"}),
        ("one W, whole", {"phm_rule", "down", "up"}),
        ("rule fixed", {"phm_rule"}),
    ],
)
def test_what_is_shared_is_one_tensor_of_the_adapter(settings: str, shared: set[str]) -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, compacter(**SETTINGS[settings]))
    assert {n for n in adapter.state_dict() if "." not in n} == shared
    deltas = [g.delta for g in adapter.grafts if isinstance(g.delta, KroneckerDelta)]
    assert len(deltas) == 4
    assert len({id(d._modules.get("common")) for d in deltas}) == 1


@pytest.mark.parametrize("settings", ["rule fixed", "rules of their own, fixed"])
def test_a_fixed_rule_is_kept_in_the_file_and_not_trained(settings: str) -> None:
    model = FAMILIES["bert"].build()
    method = compacter(**SETTINGS[settings])
    adapter = gt.attach(model, method, seed=0)
    trained, kept = dict(adapter.named_parameters()), adapter.state_dict()
    rules = {n for n in kept if "rule" in n}
    assert rules
    assert not rules & trained.keys()
    assert all(kept[name].abs().sum() > 0 for name in rules)
    assert not any(t.requires_grad for n, t in adapter.named_tensors() if n in rules)


@pytest.mark.parametrize("settings", SETTINGS)
def test_count_is_the_formula(settings: str) -> None:
    model, method = FAMILIES["llama"].build(), compacter(**SETTINGS[settings])
    adapter = gt.attach(model, method)
    assert method.count(model, gt.anatomy(model)) == adapter.count()
    n, p, places = method.phm_dim, method.phm_rank, 4
    each = 32 + 8
    factors = p * (2 * 32 + 2 * 8) if method.factorized_phm_W else 2 * 32 * 8 // n
    rule = 2 * n * n if method.factorized_phm_rule else n**3
    rules = 0 if not method.learn_phm else rule * (1 if method.shared_phm_rule else 2 * places)
    norms = 5 * 32  # two a block, and the last
    every = factors * (1 if method.shared_W_phm else places)
    assert adapter.count() == places * each + every + rules + norms


def test_initial_values() -> None:
    own = started(init="near-identity", phm_init_range=None)
    assert 0.3e-4 < own["phm_rule"].std() < 2e-4
    for name, fans in (("down_left", 257), ("down_right", 33), ("up_left", 33), ("up_right", 257)):
        bound = math.sqrt(2) * math.sqrt(6 / fans)
        assert own[name].abs().max() <= bound
        assert own[name].abs().max() > 0.9 * bound
    assert not own["down_bias"].any()
    assert not own["up_bias"].any()
    assert not started(init="zero-up")["up_right"].any()
    assert not started(init="zero-up", factorized_phm_W=False)["up"].any()
    std = started(init="adapterhub")["down_left"].std().item()
    assert abs(std - math.sqrt(2 / 257)) < 0.1 * std
    assert 0.4e-2 < started(phm_init_range=None, shared_phm_rule=False)["down_rule"].std() < 2e-2


def started(**settings: Any) -> dict[str, Tensor]:
    """Returns the tensors of a wide BERT's first adapter as they start, without their places."""
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1}
    model = FAMILIES["bert"].build(**sizes)
    method = compacter(bottleneck=128, train_head=False, **settings)
    found = gt.attach(model, method, seed=0).state_dict()
    return {name.rpartition(".")[2]: tensor for name, tensor in found.items() if "Norm" not in name}


@pytest.mark.parametrize("init", ["near-identity", "adapterhub", "zero-up"])
def test_it_starts_as_the_base_or_near_it(init: str) -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    base = logits(model, inputs)
    gt.attach(model, Compacter(bottleneck=8, init=init), seed=0)
    gap = (logits(model, inputs) - base).abs().max().item()
    assert gap == 0 if init == "zero-up" else 0 < gap < 1e-4


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"phm_dim": 0}, "phm_dim is 0, expected at least 1"),
    ("bert", {"phm_rank": 0}, "phm_rank is 0, expected at least 1"),
    ("bert", {"phm_init_range": 0.0}, "phm_init_range is 0.0, expected more than 0"),
    ("bert", {"init": "bert"}, "init is 'bert', expected one of near-identity, adapterhub, zero"),
    (
        "bert",
        {"bottleneck": None, "reduction": 32},
        "phm_dim=4 doesn't divide the bottleneck 1 of .*attention, of width 32: "
        "the nearest that fits is bottleneck=4, reduction=8",
    ),
    ("bert", {"bottleneck": 10}, r"nearest that fits is bottleneck=8, reduction=4\."),
    ("bert", {"bottleneck": 11}, r"nearest that fits is bottleneck=12\."),
    ("bert", {"phm_dim": 5}, "phm_dim=5 doesn't divide the width 32 of .*nearest that does is 4"),
    ("swin", {"shared_W_phm": True, "placement": "simple"}, "one width and one bottleneck for all"),
]


@pytest.mark.parametrize(("family", "settings", "words"), ERRORS)
def test_what_cannot_be_is_refused(family: str, settings: dict[str, Any], words: str) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(SettingsError, match=words):
        gt.attach(model, Compacter(**{"bottleneck": 8, **settings}))
    assert gt.adapters(model) == {}


def test_the_suggested_bottlenecks_fit() -> None:
    for settings in ({"bottleneck": 4}, {"reduction": 8}, {"bottleneck": 12}):
        assert gt.attach(FAMILIES["bert"].build(), Compacter(**settings)).count()


def test_plus_plus_leaves_attention_out() -> None:
    found = gt.attach(FAMILIES["t5"].build(), gt.CompacterPlusPlus(bottleneck=4)).state_dict()
    assert not any("attention.adapter" in name for name in found)
    assert gt.CompacterPlusPlus() == gt.CompacterPlusPlus.from_dict(
        {**gt.Compacter().to_dict(), "method": "CompacterPlusPlus", "sublayers": ["ffn"]}
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_tensor_gets_a_gradient(settings: str) -> None:
    model, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    adapter = gt.attach(model, compacter(**SETTINGS[settings]), seed=0)
    F.cross_entropy(model(**inputs).logits, torch.tensor([0, 1])).backward()
    assert all(t.grad is not None and t.grad.any() for t in adapter.parameters())


def test_a_copys_shared_rule_is_its_own() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, compacter(), seed=0)
    twin = gt.adapters(copy.deepcopy(model))["default"]
    rules = [dict(a.named_tensors())["phm_rule"] for a in (adapter, twin)]
    assert torch.equal(*rules)
    assert rules[0] is not rules[1]
    deltas = [g.delta for g in twin.grafts if isinstance(g.delta, KroneckerDelta)]
    assert all(d.common.get_parameter("phm_rule") is rules[1] for d in deltas)


@pytest.mark.parametrize("settings", SETTINGS)
def test_saved_and_loaded_it_is_the_same(settings: str, tmp_path: Any) -> None:
    model, inputs = FAMILIES["t5"].build(), FAMILIES["t5"].inputs()
    adapter = gt.attach(model, compacter(**SETTINGS[settings]), seed=0)
    shake(adapter, seed=1)
    expected = logits(model, inputs)
    adapter.save(tmp_path / "task")
    fresh = FAMILIES["t5"].build()
    gt.load(fresh, tmp_path / "task")
    assert torch.equal(logits(fresh, inputs), expected)


def test_bf16_hosts_keep_their_dtype_and_the_rule_its_32_bits() -> None:
    model, inputs = FAMILIES["llama"].build(dtype=torch.bfloat16), FAMILIES["llama"].inputs()
    adapter = gt.attach(model, compacter(train_norms=False))
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}
    assert logits(model, inputs).dtype is torch.bfloat16


@pytest.mark.parametrize("init", ["near-identity", "zero-up"])
def test_training_learns(init: str) -> None:
    first, last = learns(compacter(init=init, phm_init_range=None, train_norms=False), "gpt2")
    assert last < 0.9 * first


def test_settings_survive_their_file() -> None:
    method = compacter(reduction={"0": 4.0, "default": 8}, shared_phm_rule=False)
    assert Method.from_dict(method.to_dict()) == method
