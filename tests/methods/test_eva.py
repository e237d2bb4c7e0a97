"""EVA: A starts as what a linear's inputs vary in, and ranks go where that explains more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods import _eva as eva
from graftune.methods._spectrum import Spectrum
from tests.contract.subjects import logits
from tests.families import FAMILIES

UNIFORM = gt.LoRA(r=4, init="eva", eva_rho=1)


def data(family: str, count: int = 2, **options: Any) -> list[dict[str, Tensor]]:
    return [FAMILIES[family].inputs(batch=6, seed=seed, **options) for seed in range(count)]


def entering(model: nn.Module, path: str, batches: list[dict[str, Any]]) -> list[Tensor]:
    """Returns what enters a module, batch by batch."""
    seen: list[Tensor] = []
    host = model.get_submodule(path)
    handle = host.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return seen


def start_of(model: nn.Module, path: str) -> Tensor:
    """Returns the A of the adapter at a module."""
    grafts = gt.adapters(model)["default"].grafts
    delta: Any = next(graft.delta for graft in grafts if graft.place.module == path)
    return delta.A


def principal(x: Tensor, rank: int) -> Tensor:
    """Returns the first principal directions of vectors, `(rank, in)`, the slow way."""
    flat = x.reshape(-1, x.shape[-1]).double()
    return torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:rank]


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Returns the cosines of the angles between two spans."""
    bases = [torch.linalg.qr(rows.detach().double().t())[0] for rows in (one, other)]
    return torch.linalg.svdvals(bases[0].t() @ bases[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_it_starts_as_the_base_along_orthonormal_directions(family: str, rho: float) -> None:
    kind = FAMILIES[family]
    model, inputs = kind.build(), kind.inputs()
    expected = logits(model, inputs)
    method = gt.LoRA(r=4, init="eva", eva_rho=rho)
    adapter = gt.attach(model, method, data=data(family), seed=0)
    assert torch.equal(logits(model, inputs), expected)
    body = {n: t for n, t in adapter.named_parameters() if n.endswith((".A", ".B"))}
    assert not any(t.any() for n, t in body.items() if n.endswith(".B"))
    for name, A in body.items():
        if name.endswith(".A") and A.ndim == 2:
            torch.testing.assert_close(A @ A.t(), torch.eye(len(A)), atol=1e-4, rtol=0)
    count = adapter.method.count(model, gt.anatomy(kind.build()))
    assert count == sum(t.numel() for t in body.values())


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("bert", "bert.encoder.layer.1.output.dense"),
        ("gpt2", "transformer.h.1.attn.c_attn"),  # Conv1D
        ("llama", "model.layers.1.self_attn.v_proj"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k"),
        ("t5", "decoder.block.0.layer.2.DenseReluDense.wo"),
        ("opt", "model.decoder.layers.0.fc2"),
        ("vit", "vit.layers.0.mlp.fc1"),
        ("swin", "swin.encoder.layers.1.blocks.0.mlp.fc2"),
    ],
)
def test_a_is_the_leading_directions_of_what_enters(family: str, path: str) -> None:
    model = FAMILIES[family].build()
    batches = data(family, 1)
    (seen,) = entering(model, path, batches)
    gt.attach(model, gt.LoRA(r=3, init="eva", eva_rho=1), data=batches)
    assert cosines(start_of(model, path), principal(seen, 3)).min() > 1 - 1e-5


def test_slices_of_a_fused_module_share_their_start() -> None:
    model = FAMILIES["gpt2"].build()
    adapter = gt.attach(model, gt.LoRA(r=3, init="eva", targets="qv", eva_rho=1), data=data("gpt2"))
    starts = [graft.delta.A for graft in adapter.grafts if hasattr(graft.delta, "A")]
    assert len(starts) == 4
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_padding_is_left_out() -> None:
    model = FAMILIES["bert"].build()
    (batch,) = data("bert", 1, padding="right")
    path = "bert.encoder.layer.1.attention.self.query"
    (seen,) = entering(model, path, [batch])
    real = seen[batch["attention_mask"].bool()]
    gt.attach(model, gt.LoRA(r=3, init="eva", targets="query", eva_rho=1), data=[batch])
    A = start_of(model, path)
    assert cosines(A, principal(real, 3)).min() > 1 - 1e-6
    assert cosines(A, principal(seen, 3)).min() < 1 - 1e-4


@pytest.mark.parametrize("flat", [False, True])
def test_real_positions_are_found_in_flat_inputs_too(flat: bool) -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert torch.equal(eva.real(x.reshape(6, 2) if flat else x, mask), x[mask])
    assert torch.equal(eva.real(x, mask[:, :2]), x.reshape(6, 2))  # not its positions
    assert torch.equal(eva.real(x, None), x.reshape(6, 2))


def test_a_decoder_beside_an_encoder_has_its_own_positions() -> None:
    model = FAMILIES["t5"].build()
    (batch,) = data("t5", 1, padding="right")
    labels = batch["decoder_input_ids"].clone()
    labels[0, 3:] = -100
    batch = {**batch, "labels": labels}
    paths = {
        "decoder.block.0.layer.0.SelfAttention.q": labels != -100,
        "decoder.block.0.layer.1.EncDecAttention.q": labels != -100,
        "decoder.block.0.layer.1.EncDecAttention.v": batch["attention_mask"].bool(),
        "encoder.block.0.layer.0.SelfAttention.q": batch["attention_mask"].bool(),
    }
    seen = {path: entering(model, path, [batch])[0] for path in paths}
    gt.attach(model, gt.LoRA(r=3, init="eva", targets="attention", eva_rho=1), data=[batch])
    for path, mask in paths.items():
        A = start_of(model, path)
        assert cosines(A, principal(seen[path][mask], 3)).min() > 1 - 1e-6, path


def test_linears_with_the_same_input_share_one_spectrum() -> None:
    kind = FAMILIES["llama"]
    model = kind.build()
    parts = gt.anatomy(model)
    from graftune.anatomy import resolve

    chosen = resolve(model, parts, "blocks")
    wanted = eva.targets(model, parts, chosen, [4] * len(chosen), 1.0)
    found = eva.spectra(model, wanted, data("llama"), 0.99)
    block = "model.layers.0."
    one = {found[f"{block}self_attn.{n}_proj"] for n in "qkv"}
    assert len(one) == 1
    assert found[f"{block}mlp.gate_proj"] is found[f"{block}mlp.up_proj"]
    assert len(set(map(id, found.values()))) == 2 * 4


def test_no_hook_mode_or_gradient_is_left() -> None:
    model = FAMILIES["bert"].build(dropout=0.5).train()
    model.classifier.eval()
    before = {name: m.training for name, m in model.named_modules()}
    adapter = gt.attach(model, UNIFORM, data=data("bert"))
    assert {n: m.training for n, m in model.named_modules() if n in before} == before
    gt.activate(model, None)
    gt.detach(model, adapter.name)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_also_when_the_base_fails() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        gt.attach(model, UNIFORM, data=[{"nonsense": torch.ones(1)}])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not gt.adapters(model)


def test_it_takes_no_more_batches_than_it_needs() -> None:
    taken = itertools.count()

    def endless() -> Iterator[dict[str, Tensor]]:
        for seed in itertools.cycle(range(2)):
            next(taken)
            yield FAMILIES["bert"].inputs(batch=8, seed=seed)

    gt.attach(FAMILIES["bert"].build(), UNIFORM, data=endless())
    assert 2 < next(taken) < 60


def test_other_adapters_do_not_act_while_it_looks() -> None:
    model = FAMILIES["bert"].build()
    plain = gt.attach(FAMILIES["bert"].build(), UNIFORM, "eva", data=data("bert")).state_dict()
    other = gt.attach(model, gt.LoRA(r=2), "other")
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(1.0)
    beside = gt.attach(model, UNIFORM, "eva", data=data("bert")).state_dict()
    assert all(torch.equal(plain[n], t) for n, t in beside.items() if n.endswith(".A"))


# --- ranks


def spectrum(*shares: float) -> Spectrum:
    """Returns a spectrum of these shares of the variance."""
    made = Spectrum(len(shares))
    made.strengths, made.scatter = torch.tensor(shares).sqrt(), torch.tensor(1.0)
    made.mean, made.count = torch.zeros(8), 9
    return made


def target(module: str, rank: int = 2, limit: int = 4, slices: int = 1) -> eva.Target:
    return eva.Target(module, rank, limit, slices, "tokens")


def test_ranks_go_where_a_direction_explains_more() -> None:
    wanted = [target("a"), target("b")]
    found = {"a": spectrum(0.5, 0.3, 0.1, 0.05), "b": spectrum(0.2, 0.04, 0.03, 0.02)}
    assert eva.shared_out(wanted, found) == {"a": 3, "b": 1}


def test_no_target_gets_more_than_its_limit_and_one_may_get_nothing() -> None:
    found = {"a": spectrum(*[0.2] * 5), "b": spectrum(*[0.01] * 5), "c": spectrum(*[0.1] * 5)}
    wanted = [target("a"), target("b"), target("c")]
    assert eva.shared_out(wanted, found) == {"a": 4, "b": 0, "c": 2}
    wanted = [target("a", limit=2), target("b", limit=2), target("c", limit=2)]
    assert eva.shared_out(wanted, found) == {"a": 2, "b": 2, "c": 2}


def test_each_slice_of_a_module_costs() -> None:
    found = {"fused": spectrum(0.5, 0.4, 0.3, 0.2), "b": spectrum(0.1, 0.05)}
    wanted = [target("fused", slices=2, limit=3), target("b", rank=3)]
    ranks = eva.shared_out(wanted, found)  # 2 * 2 + 3 = 7 in all
    assert ranks == {"fused": 3, "b": 1}


def ranks_of(adapter: gt.Adapter) -> dict[str, int]:
    return {
        n.removesuffix(".A"): t.shape[0] for n, t in adapter.named_parameters() if n.endswith(".A")
    }


def test_the_sum_of_ranks_stays() -> None:
    for family in ("bert", "llama", "t5"):
        model = FAMILIES[family].build()
        before = ranks_of(gt.attach(model, gt.LoRA(r=4), "plain"))
        after = ranks_of(gt.attach(model, gt.LoRA(r=4, init="eva"), "eva", data=data(family)))
        assert sum(after.values()) == sum(before.values()), family
        assert set(after.values()) != {4}, family
        assert max(after.values()) <= 8


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 16}, {"rslora": True}, {"rslora": True, "alpha": 3}, {"rank_pattern": {"q": 2}}],
)
def test_every_scale_stays_and_settings_tell_the_ranks(settings: dict[str, Any]) -> None:
    model = FAMILIES["mt5"].build()
    method = gt.LoRA(r=4, init="eva", **settings)
    adapter = gt.attach(model, method, data=data("mt5"))
    moved: Any = adapter.method
    assert moved != method
    for name, rank in ranks_of(adapter).items():
        assert moved.rank_of(name) == rank
        assert math.isclose(moved.scale(name), method.scale(name), rel_tol=1e-9)
        delta: Any = next(g.delta for g in adapter.grafts if g.place.module == name)
        assert math.isclose(delta.scale, method.scale(name), rel_tol=1e-9)
    assert gt.LoRA.from_dict(moved.to_dict()) == moved


def test_what_gets_no_rank_is_left_out() -> None:
    model = FAMILIES["bert"].build()
    with torch.no_grad():  # so that nothing varies in what enters the last output
        model.bert.encoder.layer[1].intermediate.dense.weight.zero_()
    adapter = gt.attach(model, gt.LoRA(r=2, init="eva"), data=data("bert"))
    path = "bert.encoder.layer.1.output.dense"
    assert adapter.method.exclude == (path,)  # type: ignore[attr-defined]
    assert path not in ranks_of(adapter)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "mixtral", "t5"])
def test_it_is_saved_and_loaded_without_data(family: str, tmp_path: Path) -> None:
    kind = FAMILIES[family]
    model, inputs = kind.build(), kind.inputs()
    targets = "qv" if family in ("gpt2", "gpt_neox") else "blocks"
    adapter = gt.attach(model, gt.LoRA(r=3, init="eva", targets=targets), data=data(family))
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    fresh = kind.build()
    loaded = gt.load(fresh, adapter.save(tmp_path / "eva"))
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    assert loaded.method == adapter.method
    again = gt.attach(kind.build(), adapter.method, empty=True)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in adapter.state_dict().items()
    }


def test_whitening_divides_by_the_roots_of_the_strengths() -> None:
    model = FAMILIES["bert"].build()
    path = "bert.encoder.layer.0.attention.self.query"
    (seen,) = entering(model, path, data("bert", 1))
    flat = seen.flatten(0, 1)
    S = torch.linalg.svdvals(flat - flat.mean(0))[:4]
    method = gt.LoRA(r=4, init="eva", eva_rho=1, eva_whiten=True)
    gt.attach(model, method, data=data("bert", 1))
    A = start_of(model, path)
    torch.testing.assert_close(A.norm(dim=1), S**-0.5, rtol=1e-4, atol=0)


def test_dora_starts_from_data_too() -> None:
    kind = FAMILIES["llama"]
    model, inputs = kind.build(), kind.inputs()
    expected = logits(model, inputs)
    adapter = gt.attach(model, gt.LoRA(r=4, init="eva", dora=True), data=data("llama"))
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-5)
    A = adapter.grafts[0].delta.A
    torch.testing.assert_close(A @ A.t(), torch.eye(len(A)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "targets", [("experts.gate_up_proj", "q_proj"), ("embed_tokens", "q_proj")]
)
def test_what_is_no_linear_starts_plainly_at_its_own_rank(targets: tuple[str, ...]) -> None:
    model = FAMILIES["mixtral"].build()
    adapter = gt.attach(model, gt.LoRA(r=2, init="eva", targets=targets), data=data("mixtral"))
    other: Any = next(g.delta for g in adapter.grafts if not g.place.module.endswith("q_proj"))
    plain = gt.attach(model, gt.LoRA(r=2, targets=targets), "plain")
    like: Any = next(g.delta for g in plain.grafts if not g.place.module.endswith("q_proj"))
    assert type(other) is type(like)
    assert other.A.shape == like.A.shape
    assert bool(other.A.any()) == bool(like.A.any())


def test_the_meta_device_needs_no_data() -> None:
    with torch.device("meta"):
        model = FAMILIES["bert"].build(meta=True)
    adapter = gt.attach(model, gt.LoRA(r=8, init="eva", targets="qv", train_head=False))
    assert adapter.count() == 2 * 2 * 8 * (32 + 32)


def test_the_start_takes_more_of_a_first_step_than_chance() -> None:
    """What the paper proves: no A of orthonormal rows gives B a larger expected gradient."""
    kind = FAMILIES["llama"]
    norms: dict[str, float] = {}
    batch = kind.inputs(batch=16)
    for name, method in {"eva": gt.LoRA(r=4, init="eva", eva_rho=1), "plain": gt.LoRA(r=4)}.items():
        model = kind.build()
        given = [batch] if method.needs_data else None
        adapter = gt.attach(model, method, data=given, seed=0)
        if name == "plain":  # as long as EVA's, so that the direction alone counts
            with torch.no_grad():
                for graft in adapter.grafts:
                    graft.delta.A.copy_(torch.linalg.qr(graft.delta.A.t())[0].t())
        model(**batch, **kind.labels(model, batch)).loss.backward()
        grads = [graft.delta.B.grad for graft in adapter.grafts]
        norms[name] = float(torch.stack([g.square().sum() for g in grads]).sum())
    assert norms["eva"] > 1.5 * norms["plain"]


# --- refusals

WRONG: list[tuple[Any, dict[str, Any], list[str]]] = [
    (None, {}, ["LoRA looks at data before it trains", "data=[{...}, ...]"]),
    ([], {}, ['LoRA: init "eva": data holds no batch']),
    ([torch.ones(2, 3)], {}, ["a batch of data is a Tensor, expected a dictionary"]),
    (
        [FAMILIES["bert"].inputs(batch=1, length=5)],
        {"r": 8},
        ["needs more than r = 8 input vectors", "saw 5 that are no padding", "more data"],
    ),
    ([FAMILIES["bert"].inputs()], {"targets": "embeddings"}, ["starts linears", "none among the"]),
    ([FAMILIES["bert"].inputs()], {"r": 33}, ["r is 33", "32x32"]),
    (
        [FAMILIES["bert"].inputs(batch=8)],
        {"r": 32, "eva_whiten": True, "eva_rho": 1},
        ["eva_whiten divides by how much inputs vary in 32 directions"],
    ),
]


@pytest.mark.parametrize(("given", "settings", "words"), WRONG)
def test_what_can_not_be_is_told(given: Any, settings: dict[str, Any], words: list[str]) -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(SettingsError) as error:
        gt.attach(model, gt.LoRA(init="eva", **settings), data=given)
    for word in words:
        assert word in str(error.value)
    assert not gt.adapters(model)


def test_a_linear_that_never_runs_is_named() -> None:
    model = FAMILIES["clip"].build()
    batch = FAMILIES["clip"].inputs(batch=8)
    model.vision_model.forward = lambda **_: model.text_model(  # type: ignore[assignment]
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    model.visual_projection = model.text_projection
    with pytest.raises(SettingsError, match=r"vision_model\..* never ran on the data.* exclude"):
        gt.attach(model, gt.LoRA(r=2, init="eva"), data=[batch])
