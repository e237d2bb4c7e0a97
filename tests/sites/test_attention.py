"""The attention site: keys and values before a model's own: masks, caches, windows, mixtures."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import graftune as gt
from graftune.errors import AdapterError
from graftune.sites.attention import Call, asks_the_registry, registered
from graftune.sites.prefixes import Prefix
from tests.contract.subjects import logits
from tests.families import FAMILIES


def prefixed(family: str, *lengths: int, **options: Any) -> tuple[Any, list[gt.Adapter]]:
    """Returns a model with prefixes "a", "b" of some lengths, the last one active."""
    model = FAMILIES[family].build(**options)
    adapters = [
        gt.attach(model, gt.PrefixTuning(length=n, hidden=None, train_head=False), name, seed=at)
        for at, (n, name) in enumerate(zip(lengths, "abc", strict=False))
    ]
    return model, adapters


def two_attentions(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """He et al. 2022, eq. 7: (1 - l) Attn(q, K, V) + l Attn(q, P_k, P_v), l the prefix's share."""
    size, groups = query.shape[-1], query.shape[1] // key.shape[1]
    scale = size**-0.5 if scaling is None else scaling

    def score(of: Tensor) -> Tensor:
        s = query @ of.repeat_interleave(groups, 1).transpose(-1, -2) * scale
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    def by_head(prefix: Tensor) -> Tensor:
        return prefix.view(1, -1, key.shape[1], size).transpose(1, 2)

    p_k, p_v = (by_head(tensor) for tensor in module.kept)
    own, extra = score(key), score(p_k)
    own = own if attention_mask is None else own + attention_mask
    whole = torch.logaddexp(own.logsumexp(-1), extra.logsumexp(-1))
    share = (extra.logsumexp(-1) - whole).exp()[..., None]
    values = value.repeat_interleave(groups, 1), p_v.repeat_interleave(groups, 1)
    answers = [weights.softmax(-1) @ v for weights, v in zip((own, extra), values, strict=True)]
    return ((1 - share) * answers[0] + share * answers[1]).transpose(1, 2), None


@pytest.fixture
def known() -> Iterator[None]:
    """The plain form is among transformers' attentions, in one test alone."""
    AttentionInterface.register("two_attentions", two_attentions)
    AttentionMaskInterface.register("two_attentions", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        registry._global_mapping.pop("two_attentions")


def plain(family: str, adapter: gt.Adapter, **options: Any) -> nn.Module:
    """Returns a fresh base that computes the same by two attentions."""
    model: Any = FAMILIES[family].build(attn_implementation="two_attentions", **options)
    for path, pair in pairs(adapter).items():
        model.get_submodule(path).kept = pair
    return model


def pairs(adapter: gt.Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the keys and values of every attention."""
    found = {g.place.module: g.delta for g in adapter.grafts}
    return {
        path: (delta.key.detach(), delta.value.detach())  # type: ignore[union-attr]
        for path, delta in found.items()
    }


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.usefixtures("known")
def test_it_is_the_sum_of_two_attentions(family: str, padding: Any) -> None:
    model, (adapter,) = prefixed(family, 3)
    inputs = FAMILIES[family].inputs(padding=padding)
    expected = logits(plain(family, adapter), inputs)
    got, seen = logits(model, inputs), inputs["attention_mask"].bool()
    if family == "llama":
        got, expected = got[seen], expected[seen]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.usefixtures("known")
def test_no_sliding_window_hides_a_prefix(family: str) -> None:
    model, (adapter,) = prefixed(family, 3, sliding_window=4)
    inputs = FAMILIES[family].inputs(length=14)
    expected = logits(plain(family, adapter, sliding_window=4), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, atol=2e-6, rtol=1e-5)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(14):
            ids = inputs["input_ids"][:, at : at + 1]
            steps.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-6, rtol=1e-5)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "phi3"])
def test_it_is_a_cache_that_was_filled_before(family: str) -> None:
    model, (adapter,) = prefixed(family, 3)
    base: Any = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs()
    batch, length = inputs["input_ids"].shape
    heads = getattr(base.config, "num_key_value_heads", base.config.num_attention_heads)
    cache = DynamicCache(config=base.config)
    for layer, pair in enumerate(pairs(adapter).values()):
        full = [t.view(3, heads, -1).transpose(0, 1).expand(batch, -1, -1, -1) for t in pair]
        cache.update(full[0], full[1], layer)
    expected = logits(
        base,
        {
            "input_ids": inputs["input_ids"],
            "attention_mask": torch.ones(batch, 3 + length, dtype=torch.long),
            "position_ids": torch.arange(length).expand(batch, -1),
            "past_key_values": cache,  # type: ignore[dict-item]
        },
    )
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_masks_of_every_kind_say_the_same(family: str) -> None:
    answers = []
    for attention in ("sdpa", "eager"):
        model, _ = prefixed(family, 3, attn_implementation=attention)
        inputs = FAMILIES[family].inputs(padding="right")
        visible = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 7, -1)
        if family == "llama":
            visible = visible & torch.ones(7, 7, dtype=torch.bool).tril()
        as_number = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo().min)
        for mask in (inputs["attention_mask"], visible, as_number):
            if not (family == "t5" and mask.ndim == 4):  # cross-attention reads it too
                answers.append(logits(model, {**inputs, "attention_mask": mask}))
    real = visible[:, 0, -1] if family == "llama" else ...
    for answer in answers[1:]:
        torch.testing.assert_close(answer[real], answers[0][real], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5", "mistral"])
def test_a_static_cache_generates_the_same(family: str) -> None:
    model, _ = prefixed(family, 3)
    inputs = FAMILIES[family].inputs()
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_padded_left_generate_what_they_do_alone(beams: int) -> None:
    model, _ = prefixed("llama", 3)
    inputs = FAMILIES["llama"].inputs(padding="left")
    inputs.pop("position_ids")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**inputs, **options)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model.generate(inputs["input_ids"][row : row + 1, mask], **options)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_a_model_switched_to_another_attention_keeps_it() -> None:
    model, (adapter,) = prefixed("llama", 3)
    inputs = FAMILIES["llama"].inputs()
    expected = logits(model, inputs)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(logits(model, inputs), expected, atol=2e-6, rtol=1e-5)
        assert model.config._attn_implementation == f"graftune_{name}"
    gt.activate(model, None)
    gt.detach(model, adapter.name)
    assert model.config._attn_implementation == "sdpa"


def test_other_adapters_of_the_config_stay_when_one_is_taken_off() -> None:
    model, _ = prefixed("llama", 3)
    inputs = FAMILIES["llama"].inputs()
    expected = logits(model, inputs)
    gt.attach(model, gt.PrefixTuning(length=2, hidden=None, layers=0), "lowest")
    gt.activate(model, "a")
    gt.detach(model, "lowest")
    assert torch.equal(logits(model, inputs), expected)
    assert model.config._attn_implementation == "graftune_sdpa"


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|sdpa"])
def test_an_attention_that_takes_none_is_refused_before_anything_is_attached(name: str) -> None:
    model: Any = FAMILIES["llama"].build()
    model.config._attn_implementation_internal = name
    modules = [path for path, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=r'attention is ".*"sdpa", "eager" or "flex'):
        gt.attach(model, gt.PrefixTuning(length=3))
    assert [path for path, _ in model.named_modules()] == modules
    assert model.config._attn_implementation == name


def test_a_switch_to_one_that_takes_none_is_an_error_not_another_answer() -> None:
    model, _ = prefixed("llama", 3)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(AdapterError, match='attention is "flash_attention_2"'):
        logits(model, FAMILIES["llama"].inputs())


def test_a_stack_has_all_prefixes_the_last_ones_first() -> None:
    model, (a, b) = prefixed("llama", 3, 2)
    inputs = FAMILIES["llama"].inputs()
    with gt.using(model, gt.Stack("a", "b")):
        stacked = logits(model, inputs)
    with gt.using(model, gt.Stack("b", "a")):
        turned = logits(model, inputs)
    whole, (c,) = prefixed("llama", 5)
    with torch.no_grad():
        for path, pair in pairs(c).items():
            for own, first, second in zip(pair, pairs(b)[path], pairs(a)[path], strict=True):
                own.copy_(torch.cat([first, second]))
    assert torch.equal(stacked, logits(whole, inputs))
    torch.testing.assert_close(turned, stacked, atol=2e-6, rtol=1e-5)


def attended(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Returns what the first attention answers, before its output projection."""
    seen: list[Tensor] = []
    host = model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = host.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.5)])
def test_an_average_is_the_mean_of_the_answers(weights: tuple[float, float]) -> None:
    model, _ = prefixed("llama", 3, 2)
    inputs = FAMILIES["llama"].inputs()
    answers = []
    for name in ("a", "b", None):
        with gt.using(model, name):
            answers.append(attended(model, inputs))
    with gt.using(model, gt.Average("a", "b", weights=weights)):
        got = attended(model, inputs)
    shares = (*weights, 1 - sum(weights))
    expected = sum(w * answer for w, answer in zip(shares, answers, strict=True))
    torch.testing.assert_close(got, expected)


def test_rows_may_have_prefixes_of_different_lengths() -> None:
    model, _ = prefixed("llama", 3, 5)
    inputs = FAMILIES["llama"].inputs(batch=4, padding="left")
    members = ["b", None, "a", gt.Stack("a", "b")]
    with gt.using(model, gt.Rows(members)):
        mixed = logits(model, inputs)
    for row, member in enumerate(members):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        with gt.using(model, member):
            alone = logits(model, one)[0]
        real = one["attention_mask"][0].bool()
        torch.testing.assert_close(mixed[row][real], alone[real], atol=2e-6, rtol=1e-5)


def test_parallel_is_each_member_alone() -> None:
    model, _ = prefixed("t5", 3, 5)
    inputs = FAMILIES["t5"].inputs()
    with gt.using(model, gt.Parallel("a", None, "b")):
        together = logits(model, inputs).chunk(3)
    for member, got in zip(("a", None, "b"), together, strict=True):
        with gt.using(model, member):
            torch.testing.assert_close(got, logits(model, inputs), atol=2e-6, rtol=1e-5)


def test_a_drop_leaves_the_lowest_blocks_without() -> None:
    model, (adapter,) = prefixed("llama", 3)
    inputs = FAMILIES["llama"].inputs()
    with gt.using(model, "a", drop=1):
        dropped = logits(model, inputs)
    top, (last,) = FAMILIES["llama"].build(), [None]
    last = gt.attach(top, gt.PrefixTuning(length=3, hidden=None, layers=1))
    last.load_state_dict({n: t for n, t in adapter.state_dict().items() if ".1." in n})
    assert torch.equal(dropped, logits(top, inputs))


def test_weights_are_those_of_the_tokens() -> None:
    model, _ = prefixed("bert", 3, attn_implementation="eager")
    with torch.no_grad():
        weights = model(**FAMILIES["bert"].inputs(), output_attentions=True).attentions
    assert weights[0].shape == (2, 4, 7, 7)
    assert (weights[0].sum(-1) < 1).all()


def test_a_copy_from_another_process_registers_the_functions() -> None:
    model, _ = prefixed("llama", 3)
    inputs = FAMILIES["llama"].inputs()
    expected, kept = logits(model, inputs), pickle.dumps(model)
    names = [registered(name) for name in ("sdpa", "eager")]
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        for name in names:
            registry._global_mapping.pop(name)
    assert torch.equal(logits(pickle.loads(kept), inputs), expected)
    assert torch.equal(logits(copy.deepcopy(model), inputs), expected)


def test_a_long_bias_of_positions_is_cut_with_the_keys() -> None:
    module, drawn = nn.Module(), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=drawn)
    bias = torch.randn(1, 2, 4, 4, generator=drawn)
    seen: dict[str, Any] = {}

    def function(*args: Any, **options: Any) -> tuple[Tensor, None]:
        seen.update(options, mask=args[4], key=args[2])
        return args[1], None

    room = torch.zeros(1, 2, 2, 8)
    long = [torch.cat([tensor, room], 2) for tensor in (key, value)]
    options = {"position_bias": torch.nn.functional.pad(bias, (0, 2))}
    call = Call(module, function, query, long[0], long[1], None, options)
    call.after([Prefix(torch.ones(1, 16), torch.ones(1, 16))]).run()
    assert torch.equal(seen["position_bias"], torch.nn.functional.pad(bias, (1, 0)))
    assert seen["key"].shape == (1, 2, 5, 8)
    assert seen["mask"][0, 0].int().tolist() == [
        [1] * (row + 2) + [0] * (3 - row) for row in range(4)
    ]
    assert math.isclose(float(seen["key"][0, 0, 0].sum()), 8.0)


def test_which_families_ask_the_registry() -> None:
    for family, kind in FAMILIES.items():
        model = kind.build(meta=True)
        found = [
            asks_the_registry(model.get_submodule(span.projections[0].module.rpartition(".")[0]))
            for block in gt.anatomy(model).blocks
            for span in block.spans
            if span.kind != "ffn"
        ]
        assert all(found) == (family not in ("bloom", "deberta-v2"))
