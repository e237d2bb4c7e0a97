"""LoRA's settings: how it starts, what it takes with it, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AnatomyError, GraftuneError, SettingsError
from tests.contract.subjects import logits, same, shake, tensors
from tests.families import FAMILIES

QUERY = "bert.encoder.layer.0.attention.self.query"


def shapes(adapter: gt.Adapter, ending: str) -> dict[str, int]:
    """Returns the rank at each place whose name ends so."""
    return {
        n.removesuffix(".A"): t.shape[0]
        for n, t in adapter.named_parameters()
        if n.endswith(f"{ending}.A")
    }


def delta_of(model: nn.Module, path: str, name: str = "default") -> Any:
    return model.get_submodule(path).deltas[name]


def test_the_first_step_moves_b_alone() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.LoRA(r=3, train_head=False), seed=0)
    model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
    for name, tensor in adapter.named_parameters():
        grad = tensor.grad
        assert grad is not None
        assert bool(grad.any()) == name.endswith(".B"), name


def test_a_starts_kaiming_uniform_and_b_at_zero() -> None:
    model = FAMILIES["llama"].build(hidden_size=256)
    gt.attach(model, gt.LoRA(r=64, targets=("q_proj",)), seed=0)
    delta = delta_of(model, "model.layers.0.self_attn.q_proj")
    bound = 1 / math.sqrt(256)  # Kaiming's with a = sqrt(5)
    assert delta.A.abs().max() <= bound
    assert delta.A.abs().max() > 0.99 * bound
    assert math.isclose(delta.A.std().item(), bound / math.sqrt(3), rel_tol=0.03)
    assert abs(delta.A.mean().item()) < 0.02 * bound
    assert not delta.B.any()


def test_gaussian_a_has_a_deviation_of_one_over_r() -> None:
    model = FAMILIES["llama"].build(hidden_size=256)
    gt.attach(model, gt.LoRA(r=64, targets=("q_proj",), init="gaussian"), seed=0)
    delta = delta_of(model, "model.layers.0.self_attn.q_proj")
    assert math.isclose(delta.A.std().item(), 1 / 64, rel_tol=0.03)
    assert delta.A.abs().max() > 3 / 64  # no uniform distribution of that deviation
    assert not delta.B.any()


def test_an_embeddings_a_starts_at_zero_and_b_normal() -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.LoRA(r=16, targets="embeddings"), seed=0)
    delta = delta_of(model, "bert.embeddings.word_embeddings")
    assert not delta.A.any()
    assert math.isclose(delta.B.std().item(), 1, rel_tol=0.15)


@pytest.mark.parametrize("init", ["gaussian", "zero-B"])
def test_experts_start_with_no_change(init: str) -> None:
    model = FAMILIES["mixtral"].build()
    adapter = gt.attach(model, gt.LoRA(r=3, targets=("down_proj",), init=init), seed=0)  # type: ignore[arg-type]
    tensors_ = dict(adapter.named_parameters())
    assert not tensors_["model.layers.0.mlp.experts.down_proj.B"].any()
    std = 1 / 3 if init == "gaussian" else 1 / math.sqrt(3 * 80)
    A = tensors_["model.layers.0.mlp.experts.down_proj.A"]
    assert math.isclose(A.std().item(), std, rel_tol=0.1)


def test_a_seed_makes_the_start_repeatable_and_leaves_the_generator() -> None:
    torch.manual_seed(7)
    expected = torch.randn(1)
    starts = []
    for seed in (3, 3, 4):
        torch.manual_seed(7)
        adapter = gt.attach(FAMILIES["bert"].build(), gt.LoRA(), seed=seed)
        assert torch.equal(torch.randn(1), expected)
        starts.append(adapter.state_dict())
    assert same(starts[0], starts[1])
    assert not same(starts[0], starts[2])


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_starts_from_the_weight_are_the_base_bit_for_bit(init: str, family: str) -> None:
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs()
    base, before = logits(model, inputs), tensors(model)
    gt.attach(model, gt.LoRA(r=3, alpha=6, init=init))  # type: ignore[arg-type]
    assert torch.equal(logits(model, inputs), base)
    assert same(tensors(model), before)


def test_pissa_starts_at_the_top_singular_directions() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.LoRA(r=3, alpha=6, init="pissa"))
    delta, weight = delta_of(model, QUERY), model.get_submodule(QUERY).weight
    U, S, V = torch.linalg.svd(weight)
    expected = U[:, :3] @ torch.diag(S[:3]) @ V[:3]
    torch.testing.assert_close(2 * delta.B @ delta.A, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(delta.A.norm(dim=1), (S[:3] / 2).sqrt())
    torch.testing.assert_close(delta.B.norm(dim=0), (S[:3] / 2).sqrt())
    shake(adapter, seed=1)
    assert delta.rank == 6  # as an ordinary LoRA of the original weight
    assert torch.linalg.matrix_rank(delta.weight_change()) == 6


def test_olora_starts_at_the_first_qr_factors() -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.LoRA(r=3, alpha=6, init="olora"))
    delta, weight = delta_of(model, QUERY), model.get_submodule(QUERY).weight
    Q, R = torch.linalg.qr(weight)
    torch.testing.assert_close(delta.B.data, Q[:, :3])
    torch.testing.assert_close(delta.A.data, R[:3])


def test_patterns_give_modules_other_ranks_and_alphas() -> None:
    method = gt.LoRA(
        r=4,
        alpha=4,
        targets="attention",
        rank_pattern={"query": 2, r"layer\.1\..*dense": 6},
        alpha_pattern={"query": 6},
    )
    model = FAMILIES["bert"].build()
    ranks = shapes(gt.attach(model, method), "")
    assert {p.rpartition("layer.")[2]: r for p, r in ranks.items() if r != 4} == {
        "0.attention.self.query": 2,
        "1.attention.self.query": 2,
        "1.attention.output.dense": 6,
    }
    assert delta_of(model, QUERY).scale == 3
    assert delta_of(model, QUERY.replace("query", "key")).scale == 1


def test_an_alpha_left_out_follows_the_rank_of_the_module() -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.LoRA(r=4, rank_pattern={"query": 2}))
    assert delta_of(model, QUERY).scale == 1


@pytest.mark.parametrize(
    ("layers", "kept"),
    [(0, {0}), (-1, {3}), ((0, -1), {0, 3}), ("1:", {1, 2, 3}), ("-2:", {2, 3}), (":1", {0})],
)
def test_layers_keep_to_their_blocks(layers: Any, kept: set[int]) -> None:
    model = FAMILIES["bert"].build(num_hidden_layers=4)
    found = shapes(gt.attach(model, gt.LoRA(r=2, targets="qv", layers=layers)), "")
    assert {int(path.split(".")[3]) for path in found} == kept


def test_exclude_leaves_modules_out() -> None:
    model = FAMILIES["bert"].build()
    found = shapes(gt.attach(model, gt.LoRA(r=2, targets="attention", exclude=("query",))), "")
    assert len(found) == 6
    assert not any("query" in path for path in found)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 4), ("all", 18)])
def test_bias_options_train_the_biases_they_name(bias: Any, count: int) -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.LoRA(r=2, targets="qv", bias=bias, train_head=False))
    names = {n for n, _ in adapter.named_parameters() if n.endswith(".bias")}
    endings = {"none": (), "lora_only": ("query.bias", "value.bias"), "all": (".bias",)}[bias]
    assert len(names) == count
    assert all(name.endswith(endings) and "classifier" not in name for name in names)


def test_bias_options_train_nothing_where_there_is_none() -> None:
    adapter = gt.attach(FAMILIES["llama"].build(), gt.LoRA(r=2, targets="qv", bias="lora_only"))
    assert not any(n.endswith(".bias") for n, _ in adapter.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_trained_tokens_alone_change_and_in_all_that_is_tied(family: str) -> None:
    model = FAMILIES[family].build()
    ids = (7, 20)
    targets = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q"}[family]
    adapter = gt.attach(model, gt.LoRA(r=2, targets=(targets,), trainable_tokens=ids), seed=0)
    rows = next(t for n, t in adapter.named_parameters() if n.endswith("rows"))
    with torch.no_grad():
        rows.add_(1)
    every = torch.arange(99)
    changed: list[str] = []
    for name, host in model.named_modules():
        if isinstance(host, nn.Embedding) and host.num_embeddings == 99:
            moved = (host(every) - host.weight).abs().amax(1) > 0.5
            changed += [name] if moved.any() else []
            assert moved.nonzero().flatten().tolist() in ([], list(ids))
    tied = family != "llama"
    head: Any = model.get_submodule("lm_head")
    x = torch.randn(3, 32)
    difference = head(x) - x @ head.weight.t()
    moved = (difference.abs().amax(0) > 1e-3).nonzero().flatten().tolist()
    assert moved == (list(ids) if tied else [])
    if tied:
        torch.testing.assert_close(head(x)[:, ids], x @ rows.t())
    stacks = ("encoder.embed_tokens", "decoder.embed_tokens")
    assert family != "t5" or set(stacks) <= set(changed)


def test_tokens_of_an_embedding_by_name() -> None:
    model = FAMILIES["bert"].build()
    method = gt.LoRA(r=2, trainable_tokens={"position_embeddings": (1, 2, 3)})
    adapter = gt.attach(model, method)
    rows = dict(adapter.named_parameters())["bert.embeddings.position_embeddings.rows"]
    assert torch.equal(rows, model.bert.embeddings.position_embeddings.weight[1:4])


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_lora_plus_gives_b_a_higher_rate(family: str) -> None:
    method = gt.LoRA(r=2, lr_ratio=16, targets="all-linear" if family == "mixtral" else "blocks")
    adapter = gt.attach(FAMILIES[family].build(), method)
    groups = method.param_groups(adapter, lr=1e-3)
    assert groups is not None
    assert [group["lr"] for group in groups] == [1e-3, 16e-3]
    fast = {id(t) for n, t in adapter.named_parameters() if n.endswith(".B")}
    assert {id(t) for t in groups[1]["params"]} == fast
    every = [t for group in groups for t in group["params"]]
    assert sorted(map(id, every)) == sorted(id(t) for t in adapter.parameters())


def test_lora_plus_in_a_bare_loop_moves_b_further() -> None:
    moved: dict[float | None, Tensor] = {}
    for ratio in (None, 16):
        model, method = FAMILIES["bert"].build(), gt.LoRA(r=2, lr_ratio=ratio, train_head=False)
        adapter = gt.attach(model, method, seed=0)
        groups = method.param_groups(adapter, lr=1e-3) or [{"params": adapter.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=1e-3)
        model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
        optimizer.step()
        moved[ratio] = delta_of(model, QUERY).B.detach().clone()
    assert moved[None].any()
    torch.testing.assert_close(moved[16], 16 * moved[None])


def test_lora_plus_turns_an_embeddings_factors_round() -> None:
    method = gt.LoRA(r=2, lr_ratio=4, targets="embeddings")
    adapter = gt.attach(FAMILIES["bert"].build(), method)
    groups = method.param_groups(adapter, lr=1e-3)
    assert groups is not None
    delta: Any = adapter.grafts[0].delta
    assert [id(t) for t in groups[1]["params"]] == [id(delta.A)]


def test_without_a_ratio_there_are_no_groups() -> None:
    method = gt.LoRA()
    assert method.param_groups(gt.attach(FAMILIES["bert"].build(), method), lr=1e-3) is None


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "LoRA: r is 0, expected at least 1."),
    ({"r": -3}, "LoRA: r is -3, expected at least 1."),
    ({"r": "8"}, "LoRA: r is '8' (str), expected int."),
    ({"r": 2.5}, "LoRA: r is 2.5 (float), expected int."),
    ({"r": True}, "LoRA: r is True (bool), expected int."),
    ({"r": None}, "LoRA: r is None (NoneType), expected int."),
    ({"alpha": math.nan}, "LoRA: alpha is nan, expected at least 0."),
    ({"alpha": math.inf}, "LoRA: alpha is inf, expected at least 0."),
    ({"alpha": -1}, "LoRA: alpha is -1, expected at least 0."),
    ({"alpha": "16"}, "LoRA: alpha is '16' (str), expected float or None."),
    ({"dropout": 1.0}, "LoRA: dropout is 1.0, expected between 0 and 1."),
    ({"dropout": -0.1}, "LoRA: dropout is -0.1, expected between 0 and 1."),
    ({"lr_ratio": -2}, "LoRA: lr_ratio is -2, expected at least 0."),
    (
        {"init": "pisa"},
        "LoRA: init is 'pisa', expected one of zero-B, gaussian, pissa, olora, eva, loftq. "
        'Did you mean "pissa"?',
    ),
    ({"init": 3}, "LoRA: init is 3 (int), expected"),
    ({"init": "loftq", "dora": True}, 'LoRA: init "loftq" goes with neither dora nor lora_bias.'),
    ({"init": "loftq", "alpha": 0}, 'LoRA: init "loftq" divides by alpha, which is 0.'),
    ({"init": "eva", "eva_rho": 0.5}, "LoRA: eva_rho is 0.5, expected at least 1."),
    ({"init": "eva", "eva_tau": 1.1}, "LoRA: eva_tau is 1.1, expected between 0 and 1."),
    ({"eva_rho": 1.0}, 'LoRA: eva_rho is a setting of init="eva", found init="zero-B".'),
    ({"eva_whiten": True, "init": "pissa"}, 'eva_whiten is a setting of init="eva", found init="p'),
    ({"bias": "some"}, "LoRA: bias is 'some', expected one of none, all, lora_only."),
    ({"rank_pattern": {"query": 0}}, 'LoRA: rank_pattern["query"] is 0, expected at least 1.'),
    ({"rank_pattern": {"(query": 2}}, 'rank_pattern names "(query", which isn\'t a regular'),
    ({"alpha_pattern": {"query": math.nan}}, 'alpha_pattern["query"] is nan, expected at least 0.'),
    ({"init": "pissa", "alpha": 0}, 'LoRA: init "pissa" divides by alpha, which is 0.'),
    ({"rank_pattern": {"query": "2"}}, "LoRA: rank_pattern is {'query': '2'} (dict), expected"),
    ({"targets": 3}, "LoRA: targets is 3 (int), expected"),
    ({"layers": 1.5}, "LoRA: layers is 1.5 (float), expected"),
    ({"init": "pissa", "dora": True}, 'LoRA: init "pissa" goes with neither dora nor lora_bias.'),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_wrong_settings_are_refused_when_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        gt.LoRA(**settings)
    assert message in str(error.value)


MODEL: list[tuple[str, dict[str, Any], type[GraftuneError], list[str]]] = [
    ("bert", {"r": 33}, SettingsError, ["r is 33", "query is 32x32", "above 32", "rank_pattern"]),
    ("mixtral", {"r": 33, "targets": "down"}, SettingsError, ["experts.down_proj is 32x80"]),
    (
        "gpt_neox",
        {"r": 33, "targets": "value"},
        SettingsError,
        ["query_key_value is 32x32", "above 32"],
    ),
    (
        "bert",
        {"targets": "quary"},
        AnatomyError,
        ["'quary'", 'Did you mean "query"?', "query (2)", "dense (7)"],
    ),
    ("bert", {"targets": ("q_proj",)}, AnatomyError, ["'q_proj'", "query (2)"]),
    ("bert", {"targets": "gate"}, AnatomyError, ["'gate'", "this bert has none"]),
    ("bert", {"targets": ("classifier",)}, AnatomyError, ["'classifier'", "task head"]),
    ("bert", {"targets": "norms"}, AnatomyError, ["LayerNormTuning"]),
    ("bert", {"targets": "(query"}, AnatomyError, ["'(query'", "regular expression"]),
    ("bert", {"targets": ()}, AnatomyError, ["targets must be", "got ()"]),
    ("bert", {"layers": 2}, AnatomyError, ["Layer 2", "2 layers", "encoder 0-1"]),
    ("bert", {"layers": -3}, AnatomyError, ["Layer -3", "2 layers"]),
    ("bert", {"layers": "5:"}, AnatomyError, ["'5:'", "2 layers"]),
    ("bert", {"layers": "last"}, AnatomyError, ["'last'", "2:6"]),
    ("bert", {"exclude": ("quary",)}, AnatomyError, ["'quary'", "query"]),
    (
        "bert",
        {"targets": "query", "exclude": ("query",)},
        AnatomyError,
        ["leave nothing to adapt"],
    ),
    (
        "bert",
        {"rank_pattern": {"q_proj": 2}},
        SettingsError,
        ['rank_pattern names "q_proj"', "12 targets", "query"],
    ),
    ("bert", {"alpha_pattern": {"uery": 2}}, SettingsError, ['alpha_pattern names "uery"']),
    (
        "bert",
        {"trainable_tokens": (99,)},
        SettingsError,
        ["trainable_tokens", "0 to 98", "found [99]"],
    ),
    ("bert", {"trainable_tokens": (1, 1)}, SettingsError, ["different ids", "found [1, 1]"]),
    ("bert", {"trainable_tokens": {"word_embeddings": ()}}, SettingsError, ["found []"]),
    (
        "bert",
        {"trainable_tokens": {"query": (1,)}},
        SettingsError,
        ['"query", which means no embedding'],
    ),
    (
        "t5",
        {"trainable_tokens": {"embed_tokens": (1,)}, "targets": "qv"},
        SettingsError,
        ["means 2 embeddings", "encoder.embed_tokens, "],
    ),
    ("mixtral", {"dropout": 0.1}, SettingsError, ["experts", "dropout", 'targets="attention"']),
    ("mixtral", {"dora": True}, SettingsError, ["experts", "dora"]),
    (
        "bert",
        {"init": "pissa", "targets": "embeddings"},
        SettingsError,
        ['init "pissa"', "word_embeddings is of kind embedding"],
    ),
    ("bert", {"train_head": ("classifer",)}, SettingsError, ['"classifer"', '"classifier"']),
]


@pytest.mark.parametrize(("family", "settings", "kind", "words"), MODEL)
def test_what_does_not_fit_the_model_is_refused_whole(
    family: str, settings: dict[str, Any], kind: type[GraftuneError], words: list[str]
) -> None:
    model = FAMILIES[family].build(**({"num_labels": 3} if family == "bert" else {}))
    before = [name for name, _ in model.named_modules()]
    attributes, flags = set(model.__dict__), [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind) as error:
        gt.attach(model, gt.LoRA(**settings))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert [name for name, _ in model.named_modules()] == before
    assert set(model.__dict__) == attributes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert gt.adapters(model) == {}


def test_a_grouped_convolution_is_refused_by_name() -> None:
    model = FAMILIES["vit"].build()
    old = model.vit.embeddings.patch_embeddings.projection
    grouped = nn.Conv2d(3, 33, old.kernel_size, old.stride, groups=3)
    model.vit.embeddings.patch_embeddings.projection = grouped
    with pytest.raises(SettingsError, match="projection is a grouped convolution"):
        gt.attach(model, gt.LoRA(r=1, targets=("projection",)))


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r'LoRA has no setting "rnak_pattern".*"rank_pattern"'):
        gt.LoRA.from_dict({"method": "LoRA", "rnak_pattern": {}})
