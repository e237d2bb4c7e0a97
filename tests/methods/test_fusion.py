"""AdapterFusion: its equation against a plain one, its stages, what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError, FormatError, SettingsError, TrainingError
from graftune.methods.fusion import FusionDelta, fusions
from graftune.sites.base import Bottleneck
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.test_counts import model_of

MEMBERS = {
    "a": gt.PfeifferAdapter(reduction=8),
    "b": gt.PfeifferAdapter(reduction=4),
}


def model_with(family: str = "bert", **members: Any) -> nn.Module:
    model = FAMILIES[family].build()
    for seed, (name, method) in enumerate((members or MEMBERS).items()):
        shake(gt.attach(model, method, name, seed=seed), seed)
    return model


def fused(model: nn.Module, **settings: Any) -> gt.Adapter:
    return gt.attach(model, gt.AdapterFusion(members=("a", "b"), **settings), "ab", seed=5)


def plain(delta: FusionDelta, h: Tensor, parts: list[Bottleneck]) -> Tensor:
    """The paper's equation, adapter by adapter."""
    z, r = parts[-1].read, parts[-1].skip
    query = z @ delta.query.t() + delta.query_bias
    keys = [part.change @ delta.key.t() + delta.key_bias for part in parts]
    scores = torch.stack([(query * key).sum(-1) for key in keys], -1)
    weights = torch.softmax(scores / delta.temperature, -1)
    values = [p.change if delta.value is None else p.change @ delta.value.t() for p in parts]
    return r + sum(weights[..., i, None] * value for i, value in enumerate(values))


@pytest.mark.parametrize("settings", [{}, {"value": False}, {"temperature": 3.0}])
def test_it_is_the_papers_equation(settings: dict[str, Any]) -> None:
    delta = FusionDelta(gt.AdapterFusion(members=("a", "b", "c"), **settings), 6, {"device": "cpu"})
    draw = torch.Generator().manual_seed(0)
    for tensor in delta.parameters():
        tensor.data = torch.randn(tensor.shape, generator=draw)
    h, z, r, *changes = (torch.randn(2, 5, 6, generator=draw) for _ in range(6))
    parts = [Bottleneck(z, change, r) for change in changes]
    assert torch.allclose(delta(h, parts), plain(delta, h, parts), atol=1e-5)
    weights = delta.weights(z, torch.stack(changes, -2))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "opt", "mixtral", "gemma2"])
def test_it_starts_near_the_mean_of_its_members(family: str) -> None:
    model, inputs = model_with(family), FAMILIES[family].inputs()
    for adapter in gt.adapters(model).values():  # the same head for all
        for graft in adapter.grafts:
            if graft.place.parameter:
                graft.delta.value.data.zero_()
    fused(model, train_head=False)
    with gt.using(model, gt.Fuse("a", "b")):
        together = logits(model, inputs)
    with gt.using(model, gt.Average("a", "b")):
        mean = logits(model, inputs)
    if family != "bert":  # whose members' heads say something else
        assert torch.allclose(together, mean, atol=2e-3 * mean.abs().max().item())


def test_the_identity_and_one_member_kept_is_that_member() -> None:
    model, inputs = model_with("llama"), FAMILIES["llama"].inputs()
    fusion = fused(model, value=False)
    for layer in fusions(fusion).values():
        layer.attention.copy_(torch.tensor([0.9, 0.1]))
    assert set(gt.prune_fusion(model, "ab", 1).values()) == {("a",)}
    out = logits(model, inputs)
    with gt.using(model, "a"):
        assert torch.allclose(out, logits(model, inputs), atol=1e-6)


def test_the_order_of_members_only_permutes_the_weights() -> None:
    model, inputs = model_with("llama"), FAMILIES["llama"].inputs()
    first = fused(model)
    other = gt.attach(model, gt.AdapterFusion(members=("b", "a")), "ba")
    for name, tensor in other.named_parameters():
        tensor.data.copy_(first.state_dict()[name])
    one, two = (gt.fusion_weights(model, name, [inputs]) for name in ("ab", "ba"))
    for place, weights in one.items():
        assert torch.allclose(weights.flip(0), two[place], atol=1e-6)


def test_a_fusion_is_named_by_itself_or_by_its_members() -> None:
    model, inputs = model_with(), FAMILIES["bert"].inputs()
    fused(model)
    out = logits(model, inputs)
    for composition in ("ab", gt.Fuse("a", "b"), gt.Fuse("a", "b", name="ab")):
        gt.activate(model, composition)
        assert torch.equal(logits(model, inputs), out)


def test_only_the_fusion_and_its_head_train() -> None:
    model = model_with()
    fusion = fused(model)
    fusion.begin(3)
    members = [gt.adapters(model)[name] for name in "ab"]
    before = [{n: t.clone() for n, t in member.named_parameters()} for member in members]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in fusion.parameters()}
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=1e-2)
    inputs = FAMILIES["bert"].inputs()
    for step in range(1, 4):
        loss = model(**inputs, labels=torch.tensor([0, 1])).loss + fusion.penalty()
        loss.backward()
        optimizer.step()
        fusion.advance(step)
    assert all(p.grad is not None and p.grad.any() for p in fusion.parameters())
    for member, was in zip(members, before, strict=True):
        for name, tensor in member.named_parameters():
            assert tensor.grad is None
            assert torch.equal(tensor, was[name])


def test_the_penalty_pulls_v_to_the_identity() -> None:
    model = model_with()
    fusion = fused(model, value_penalty=0.5)
    assert fusion.penalty().item() == pytest.approx(2 * 0.5 * 32 * 31 * 1e-12, rel=1e-3)
    for layer in fusions(fusion).values():
        layer.value.data.add_(1.0)
    assert fusion.penalty().item() == pytest.approx(2 * 0.5 * 32 * 32, rel=1e-4)
    inputs = FAMILIES["bert"].inputs()
    with pytest.raises(TrainingError, match="has a penalty or a schedule that training must call"):
        model.train()(**inputs)


def test_it_counts_three_squares_a_layer() -> None:
    model = model_with()
    method = gt.AdapterFusion(members=("a", "b"))
    assert method.count(model, gt.anatomy(model)) == 2 * (3 * 32 * 32 + 2 * 32)
    static = gt.AdapterFusion(members=("a", "b"), value=False)
    assert static.count(model, gt.anatomy(model)) == 2 * (2 * 32 * 32 + 2 * 32)


def test_it_is_saved_and_loaded_beside_its_members(tmp_path: Any) -> None:
    model, inputs = model_with(), FAMILIES["bert"].inputs()
    fusion = fused(model)
    shake(fusion, 9)
    gt.prune_fusion(model, "ab", 1, [inputs])
    expected = logits(model, inputs)
    for adapter in gt.adapters(model).values():
        adapter.save(tmp_path / adapter.name)
    fresh = FAMILIES["bert"].build()
    with pytest.raises(FormatError, match='member "a" is not attached'):
        gt.load(fresh, tmp_path / "ab", name="ab")
    assert not gt.adapters(fresh)
    for name in ("a", "b", "ab"):
        gt.load(fresh, tmp_path / name, name=name)
    assert torch.equal(logits(fresh, inputs), expected)


def test_mixed_rows_and_stacks_hold_fusions() -> None:
    model, inputs = model_with("llama", **MEMBERS, under=gt.LoRA(r=2)), FAMILIES["llama"].inputs()
    fused(model)
    alone = {}
    for name in ("ab", "a"):
        with gt.using(model, name):
            alone[name] = logits(model, inputs)
    with gt.using(model, gt.Rows(["ab", "a"])):
        mixed = logits(model, inputs)
    assert torch.allclose(mixed[0], alone["ab"][0], atol=1e-5)
    assert torch.allclose(mixed[1], alone["a"][1], atol=1e-5)
    with gt.using(model, gt.Stack("under", gt.Fuse("a", "b"))):
        assert not torch.allclose(logits(model, inputs), alone["ab"])


def test_a_stack_can_be_a_member() -> None:
    model, inputs = model_with("llama", **MEMBERS, low=MEMBERS["a"]), FAMILIES["llama"].inputs()
    fusion = gt.attach(model, gt.AdapterFusion(members=(("low", "a"), "b"), value=False), "f")
    for layer in fusions(fusion).values():
        layer.kept[1] = False
    fused_one = logits(model, inputs)
    with gt.using(model, gt.Stack("low", "a")):
        assert torch.allclose(fused_one, logits(model, inputs), atol=1e-5)


def test_attention_is_drawn_once_it_is_measured() -> None:
    model = model_with()
    fusion = fused(model)
    assert fusion.method.heat_maps(fusion) == []
    inputs = FAMILIES["bert"].inputs(padding="right")
    found = gt.fusion_weights(model, "ab", [inputs, inputs])
    for weights in found.values():
        assert weights.sum().item() == pytest.approx(1.0)
    (drawn,) = fusion.method.heat_maps(fusion)
    assert drawn.rows == ("ffn.a", "ffn.b")
    assert [sum(column) for column in zip(*drawn.values, strict=True)] == pytest.approx([1, 1])


def test_padding_is_left_out_of_the_measure() -> None:
    model = model_with("llama")
    shake(fused(model), 3)
    padded = FAMILIES["llama"].inputs(padding="right")
    real = {key: value[:1, :5] for key, value in padded.items()}
    rest = {key: value[1:] for key, value in padded.items()}
    one = gt.fusion_weights(model, "ab", [padded])
    two = gt.fusion_weights(model, "ab", [real, rest])
    for place, weights in one.items():
        assert torch.allclose(weights, two[place], atol=1e-5)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (("a",), "expected two or more different"),
        (("a", "a"), "expected two or more different"),
        (("a", "c"), 'member "c" is not attached; attached: a, b, lora, norms, two'),
        (("a", "two"), '"two" has a bottleneck at .*attention, "a" has none there'),
        (("a", "lora"), '"lora" also changes .* which a fusion can\'t join'),
        (("two", "norms"), '"norms" also changes .*LayerNorm, which a fusion can\'t join'),
    ],
)
def test_members_that_do_not_fit_are_refused(members: tuple[str, ...], words: str) -> None:
    others = {
        "two": gt.HoulsbyAdapter(bottleneck=4, train_norms=False),
        "lora": gt.LoRA(r=2),
        "norms": gt.HoulsbyAdapter(bottleneck=4),
    }
    model = model_with("bert", **MEMBERS, **others)
    before = list(gt.adapters(model))
    with pytest.raises(SettingsError, match=words):
        gt.attach(model, gt.AdapterFusion(members=members), "fusion")
    assert list(gt.adapters(model)) == before


def test_a_fuse_without_its_fusion_is_refused() -> None:
    model = model_with()
    with pytest.raises(AdapterError, match=r"No fusion of 'a', 'b' is attached: first gt.attach"):
        gt.activate(model, gt.Fuse("a", "b"))
    fused(model)
    with pytest.raises(AdapterError, match="No fusion of 'b', 'a' is attached"):
        gt.activate(model, gt.Fuse("b", "a"))
    gt.activate(model, None)
    with pytest.raises(AdapterError, match='"a" is a member of the fusion "ab": detach that first'):
        gt.detach(model, "a")
    gt.detach(model, "ab")
    gt.detach(model, "a")


def test_pruning_needs_a_measure_and_a_number_of_members() -> None:
    model = model_with()
    fused(model)
    with pytest.raises(AdapterError, match="was never measured"):
        gt.prune_fusion(model, "ab", 1)
    for keep in (0, 3, True):
        with pytest.raises(SettingsError, match=f"keep is {keep!r}, expected from 1 to 2"):
            gt.prune_fusion(model, "ab", keep)
    with pytest.raises(AdapterError, match='"a" is PfeifferAdapter, not an AdapterFusion'):
        gt.fusion_weights(model, "a", [])
    with pytest.raises(SettingsError, match="needs one batch or more"):
        gt.fusion_weights(model, "ab", [])


def test_a_fusion_can_not_be_merged() -> None:
    model = model_with()
    fused(model)
    with pytest.raises(AdapterError, match=r"merge takes an adapter's name|can't be merged"):
        gt.merge(model, "ab")


@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_family_it_is_switched_mixed_copied_and_saved(family: str, tmp_path: Any) -> None:
    base = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs()
    expected = logits(base, inputs)
    model = model_with(family)
    shake(fused(model), 7)
    out = logits(model, inputs)
    assert not torch.allclose(out, expected)
    with gt.using(model, None):
        assert torch.equal(logits(model, inputs), expected)
    scale = max(1.0, out.abs().max().item())
    with gt.using(model, "b"):
        alone = logits(model, inputs)
    if family != "clip":  # whose rows see each other
        with gt.using(model, gt.Rows(["ab", "b"])):
            mixed = logits(model, inputs)
        assert torch.allclose(mixed[0], out[0], atol=1e-5 * scale)
        assert torch.allclose(mixed[1], alone[1], atol=1e-5 * scale)
    assert torch.equal(logits(copy.deepcopy(model), inputs), out)
    for adapter in gt.adapters(model).values():
        adapter.save(tmp_path / adapter.name)
    for name in ("a", "b", "ab"):
        gt.load(base, tmp_path / name, name=name)
    assert torch.equal(logits(base, inputs), out)
    for name in ("ab", "a", "b"):
        gt.activate(model, None)
        gt.detach(model, name)
    assert torch.equal(logits(model, inputs), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "whole", "static"),
    [
        ("BERT-base", 21_252_096, 14_174_208),
        ("LLaMA-7B", 1_610_874_880, 1_074_003_968),
        ("T5-base", 42_504_192, 28_348_416),
        ("ViT-B/16", 21_252_096, 14_174_208),
    ],
)
def test_counts_are_the_papers(name: str, whole: int, static: int) -> None:
    model = copy.deepcopy(model_of(name))
    for member in "ab":
        gt.attach(model, gt.PfeifferAdapter(), member)
    for value, expected in ((True, whole), (False, static)):
        method = gt.AdapterFusion(members=("a", "b"), value=value)
        assert method.count(model, gt.anatomy(model)) == expected
        assert gt.attach(model, method, f"value-{value}").count() == expected
