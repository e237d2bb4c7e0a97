"""The attention site of BLOOM and DeBERTa-v2: exact, and gone with the pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, RemBertConfig, RemBertModel

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.sites.softmax import Scores, SoftmaxSite, Watched
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

OURS = ("bloom", "deberta-v2")
HOSTS = {
    "bloom": ("transformer.h.0.self_attention", "dense"),
    "deberta-v2": ("deberta.encoder.layer.0.attention.self", None),
}
"""An attention, and the child that takes its heads' outputs; None if it returns them."""


def prefixed(family: str, *lengths: int, **options: Any) -> Any:
    """Returns a model with prefixes "a", "b" of some lengths, the last one active."""
    model = FAMILIES[family].build(**options)
    for at, (n, name) in enumerate(zip(lengths, "ab", strict=False)):
        method = gt.PrefixTuning(length=n, hidden=None, train_head=False)
        gt.attach(model, method, name, seed=at)
    return model


def heads_output(model: nn.Module, family: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Returns what the first attention was given and what its heads answered, `(B, T, d)`."""
    path, child = HOSTS[family]
    host, seen = model.get_submodule(path), dict[str, Any]()

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        names = ("hidden_states", "residual" if child else "attention_mask")
        seen.update(zip(names, args, strict=False))
        seen.update(kwargs)

    handles = [host.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)]
    if child is None:
        handles.append(host.register_forward_hook(lambda _, args, out: seen.update(out=out[0])))
    else:
        below = host.get_submodule(child)
        handles.append(below.register_forward_pre_hook(lambda _, args: seen.update(out=args[0])))
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def bloom_scores(host: Any, x: Tensor, seen: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    qkv = host.query_key_value(x).unflatten(-1, (4, 3, 8)).transpose(1, 2)  # (B, H, T, 3, D)
    scores = qkv[..., 0, :] @ qkv[..., 1, :].transpose(2, 3) / math.sqrt(8)
    scores = scores + seen["alibi"].view(len(x), 4, 1, -1)
    mask = seen["attention_mask"]
    return qkv[..., 0, :], scores if mask is None else scores + mask, 8**-0.5


def deberta_scores(host: Any, x: Tensor, seen: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    query, key = (
        proj(x).unflatten(-1, (4, 8)).transpose(1, 2) for proj in (host.query_proj, host.key_proj)
    )
    factor = 1 + len(host.pos_att_type)
    scale = (8 * factor) ** -0.5
    scores = query @ key.transpose(2, 3) * scale
    if host.relative_attention:
        flat = query.reshape(-1, *query.shape[2:]), key.reshape(-1, *key.shape[2:])
        more = (seen.get("relative_pos"), seen["rel_embeddings"], factor)
        scores = scores + host.disentangled_attention_bias(*flat, *more).view(scores.shape)
    hidden = torch.finfo(torch.float32).min
    return query, scores.masked_fill(~seen["attention_mask"].bool(), hidden), scale


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {}),
    ("deberta-v2", {}),
    ("deberta-v2", {"relative_attention": False, "pos_att_type": []}),
    ("deberta-v2", {"pos_att_type": ["c2p"], "share_att_key": True}),
]


@pytest.mark.parametrize(("family", "options"), SETTINGS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_it_is_the_sum_of_two_attentions(family: str, options: Any, padding: Any) -> None:
    """He et al. 2022, eq. 7: (1 - l) Attn(q, K, V) + l Attn(q, P_k, P_v), l the prefix's share."""
    model, inputs = prefixed(family, 3, **options), FAMILIES[family].inputs(padding=padding)
    host: Any = model.get_submodule(HOSTS[family][0])
    got = heads_output(model, family, inputs)["out"].unflatten(-1, (4, 8)).transpose(1, 2)
    with gt.using(model, None):
        seen = heads_output(model, family, inputs)
    own = seen["out"].unflatten(-1, (4, 8)).transpose(1, 2)
    delta = host.deltas["a"]
    P_k, P_v = (p.detach().view(3, 4, 8).transpose(0, 1) for p in (delta.key, delta.value))
    find = bloom_scores if family == "bloom" else deberta_scores
    with torch.no_grad():
        query, scores, scale = find(host, seen["hidden_states"], seen)
    extra = query @ P_k.transpose(1, 2) * scale
    whole = torch.logaddexp(scores.logsumexp(-1), extra.logsumexp(-1))
    share = (extra.logsumexp(-1) - whole).exp()[..., None]
    expected = (1 - share) * own + share * (extra.softmax(-1) @ P_v)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_a_cache_token_by_token_is_one_pass_and_holds_plain_tensors() -> None:
    model, inputs = prefixed("bloom", 3), FAMILIES["bloom"].inputs(length=9)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(9):
            ids = inputs["input_ids"][:, at : at + 1]
            steps.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, inputs), atol=2e-6, rtol=1e-5)
    assert cache.get_seq_length() == 9
    assert {type(layer.keys) for layer in cache.layers} == {Tensor}


@pytest.mark.parametrize("family", OURS)
def test_weights_are_those_of_the_tokens_in_plain_tensors(family: str) -> None:
    model = prefixed(family, 3)
    with torch.no_grad():
        output = model(**FAMILIES[family].inputs(), output_attentions=True)
    for weights in output.attentions:
        assert weights.shape == (2, 4, 7, 7)
        assert type(weights) is Tensor
        assert (weights.sum(-1) < 1).all()
    assert type(output.logits) is Tensor


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlasts_a_pass_that_is_broken_off(family: str, error: Any) -> None:
    model, inputs = prefixed(family, 3), FAMILIES[family].inputs()
    base, expected = logits(FAMILIES[family].build(), inputs), logits(model, inputs)
    host: Any = model.get_submodule(HOSTS[family][0])
    dropout = host.attention_dropout if family == "bloom" else host.dropout

    def interrupt(*_: Any) -> None:
        raise error

    handle = dropout.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        logits(model, inputs)
    handle.remove()
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(logits(model, inputs), expected)
    with gt.using(model, None):
        assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("family", OURS)
def test_it_sees_the_queries_that_other_adapters_change(family: str) -> None:
    model, inputs = prefixed(family, 3), FAMILIES[family].inputs()
    lora = gt.attach(model, gt.LoRA(targets="qv", dropout=0.0, train_head=False), "lora", seed=5)
    shake(lora, seed=6)
    gt.activate(model, gt.Stack("a", "lora"))
    together = logits(model, inputs)
    with gt.using(model, "a"):
        assert (logits(model, inputs) - together).abs().max() > 1e-3
    gt.activate(model, "lora")
    gt.merge(model, "lora")
    gt.activate(model, "a")
    torch.testing.assert_close(logits(model, inputs), together, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("family", OURS)
def test_a_stack_has_all_prefixes_and_an_average_the_mean_of_the_answers(family: str) -> None:
    model, inputs = prefixed(family, 3, 2), FAMILIES[family].inputs()
    answers = {}
    for members in ("a", "b", gt.Stack("a", "b"), gt.Stack("b", "a"), gt.Average("a", "b")):
        with gt.using(model, members):
            answers[str(members)] = heads_output(model, family, inputs)["out"]
    a, b, stacked, turned, averaged = answers.values()
    torch.testing.assert_close(averaged, (a + b) / 2, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(turned, stacked, atol=2e-6, rtol=1e-5)
    whole = prefixed(family, 5)
    with torch.no_grad():
        for left, right, both in zip(
            gt.adapters(model)["b"].grafts,
            gt.adapters(model)["a"].grafts,
            gt.adapters(whole)["a"].grafts,
            strict=True,
        ):
            for name in ("key", "value"):
                parts = [getattr(one.delta, name) for one in (left, right)]
                getattr(both.delta, name).copy_(torch.cat(parts))
    expected = heads_output(whole, family, inputs)["out"]
    torch.testing.assert_close(stacked, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", OURS)
def test_rows_may_have_prefixes_of_different_lengths(family: str) -> None:
    model, inputs = prefixed(family, 3, 5), FAMILIES[family].inputs(batch=4)
    members = ["b", None, "a", gt.Stack("a", "b")]
    with gt.using(model, gt.Rows(members)):
        mixed = logits(model, inputs)
    for row, member in enumerate(members):
        with gt.using(model, member):
            alone = logits(model, {name: t[row : row + 1] for name, t in inputs.items()})
        torch.testing.assert_close(mixed[row], alone[0], atol=2e-6, rtol=1e-5)


def test_a_drop_leaves_the_lowest_blocks_without() -> None:
    model, inputs = prefixed("bloom", 3), FAMILIES["bloom"].inputs()
    with gt.using(model, "a", drop=1):
        dropped = logits(model, inputs)
    top = FAMILIES["bloom"].build()
    method = gt.PrefixTuning(length=3, hidden=None, layers=1)
    found = gt.adapters(model)["a"].state_dict()
    gt.attach(top, method).load_state_dict({n: t for n, t in found.items() if ".1." in n})
    assert torch.equal(dropped, logits(top, inputs))


def test_weights_of_a_prefix_are_dropped_as_the_models_own() -> None:
    host: Any = FAMILIES["bloom"].build(attention_dropout=1.0).transformer.h[0].self_attention
    query, scores = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 5)
    call = Scores(host, query, scores, lambda x: x.softmax(-1), 1.0)
    model = prefixed("bloom", 3)
    delta = model.transformer.h[0].self_attention.deltas["a"]
    assert call.answer([delta])[0][..., 5:].abs().min() > 0
    host.train()
    assert not call.answer([delta])[0][..., 5:].any()


def test_watched_tensors_show_what_is_in_lists_too() -> None:
    model = prefixed("deberta-v2", 3)
    host: Any = model.deberta.encoder.layer[0].attention.self
    site = host.deltas._modules["attention"]
    assert isinstance(site, SoftmaxSite)
    _, given = site.before(host, (torch.ones(1, 4, 32), torch.ones(1, 1, 4, 4)), {})
    mask = given["attention_mask"]
    assert isinstance(torch.cat([torch.ones(1, 1, 4, 4), mask], 0), Watched)
    assert all(isinstance(part, Watched) for part in mask.split(2, -1))
    assert mask.shape == (1, 1, 4, 4)
    assert isinstance(given["query_states"], Watched)


def test_it_can_not_be_compiled_and_says_so() -> None:
    model, inputs = prefixed("bloom", 3), FAMILIES["bloom"].inputs()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(AdapterError, match="BloomAttention can't be compiled"):
        logits(compiled, inputs)
    with gt.using(model, None):
        assert torch.equal(logits(compiled, inputs), logits(FAMILIES["bloom"].build(), inputs))


def test_another_model_that_computes_its_attention_itself_is_refused() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes = {"vocab_size": 99, "input_embedding_size": 32, "intermediate_size": 64}
    model = RemBertModel(RemBertConfig(**small, **sizes))
    modules = [name for name, _ in model.named_modules()]
    for method in (gt.PrefixTuning(length=3), gt.PTuningV2(), gt.LLaMAAdapter()):
        with pytest.raises(SettingsError, match=r"RemBertSelfAttention\) computes its attention"):
            gt.attach(model, method)
    assert [name for name, _ in model.named_modules()] == modules
