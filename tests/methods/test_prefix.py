"""Prefix tuning and P-tuning v2: values, the MLP that is dropped, files, training, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import check_uniform, learns

MLP = gt.PrefixTuning(length=3, hidden=8, train_head=False)
DIRECT = gt.PrefixTuning(length=3, hidden=None, train_head=False)


def test_the_published_settings_are_the_defaults() -> None:
    method = gt.PrefixTuning()
    assert (method.hidden, method.dropout, method.layers) == (512, 0.0, None)
    assert method.sublayers == ("attention", "cross-attention")
    assert (gt.PTuningV2().hidden, gt.PTuningV2().dropout) == (None, 0.1)


def test_the_mlp_makes_each_layers_keys_and_values() -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, MLP, seed=0)
    found = {name.rpartition(".")[2]: t for name, t in adapter.named_parameters()}
    inner = torch.tanh(F.linear(found["E"], found["W1"], found["c1"]))
    made = F.linear(inner, found["W2"], found["c2"])
    for graft, expected in zip(adapter.grafts, made.chunk(2, dim=-1), strict=True):
        key, value = graft.delta.prefix(2)
        torch.testing.assert_close(torch.cat([key, value], -1), expected)


def test_stacks_and_kinds_of_attention_have_an_mlp_each() -> None:
    adapter = gt.attach(FAMILIES["t5"].build(), MLP)
    assert {name.rpartition(".")[0] for name in adapter.state_dict()} == {
        "prefix_encoder_attention",
        "prefix_decoder_attention",
        "prefix_decoder_cross_attention",
    }


def test_initial_values() -> None:
    direct = gt.attach(FAMILIES["bert"].build(), gt.PTuningV2(length=500, train_head=False))
    for tensor in direct.parameters():
        assert abs(tensor.std().item() - 1) < 0.02
    wide = gt.PrefixTuning(length=400, hidden=300, train_head=False)
    made = gt.attach(FAMILIES["bert"].build(), wide).state_dict()
    found = {name.rpartition(".")[2]: tensor for name, tensor in made.items()}
    assert abs(found["E"].std().item() - 1) < 0.02
    check_uniform(found["W1"], 32, within=0.03)
    check_uniform(found["W2"], 300, within=0.03)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_without_the_mlp_it_answers_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    adapter = gt.attach(model, MLP, seed=0)
    shake(adapter, seed=1)
    expected = logits(model, inputs)
    adapter.save(tmp_path / "training")
    adapter.finish()
    kept = adapter.state_dict()
    assert {name.rpartition(".")[2] for name in kept} == {"key", "value"}
    assert all(tensor.requires_grad for tensor in adapter.parameters())
    assert torch.equal(logits(model, inputs), expected)
    adapter.finish()
    assert adapter.state_dict().keys() == kept.keys()
    adapter.save(tmp_path / "finished")
    for folder in ("training", "finished"):
        fresh = FAMILIES[family].build()
        loaded = gt.load(fresh, tmp_path / folder)
        assert torch.equal(logits(fresh, inputs), expected)
        assert (loaded.state_dict().keys() == kept.keys()) == (folder == "finished")
        loaded.finish()
        assert torch.equal(logits(fresh, inputs), expected)


def test_a_finished_prefix_is_all_that_is_kept_and_counted() -> None:
    adapter = gt.attach(FAMILIES["llama"].build(), MLP)
    assert adapter.count() == 3 * 32 + 8 * 33 + 9 * 2 * 2 * 16
    adapter.finish()
    assert adapter.count() == 2 * 2 * 3 * 16


@pytest.mark.parametrize("method", [MLP, DIRECT, gt.PTuningV2(length=3, hidden=8)])
@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_gradients_reach_every_tensor(method: Any, family: str) -> None:
    model, kind = FAMILIES[family].build(), FAMILIES[family]
    adapter = gt.attach(model, method)
    model.train()
    model(**kind.inputs(), **kind.labels(model, kind.inputs())).loss.backward()
    for name, tensor in adapter.named_parameters():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("method", [MLP, gt.PTuningV2(length=5, dropout=0.0)])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_learns(method: Any, family: str) -> None:
    first, last = learns(method, family)
    assert last < 0.9 * first


@pytest.mark.parametrize("hidden", [None, 8])
def test_dropout_is_in_training_alone(hidden: int | None) -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    adapter = gt.attach(model, gt.PrefixTuning(length=30, hidden=hidden, dropout=0.5))
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    key, _ = adapter.grafts[0].delta.prefix(2)
    assert 0.4 < (key == 0).float().mean() < 0.6


@pytest.mark.parametrize(
    ("sublayers", "attentions"),
    [(("attention",), 4), (("cross-attention",), 2), (("attention", "cross-attention"), 6)],
)
def test_which_attentions_have_one(sublayers: tuple[str, ...], attentions: int) -> None:
    method = gt.PrefixTuning(length=3, hidden=None, sublayers=sublayers)
    assert len(gt.attach(FAMILIES["t5"].build(), method).grafts) == attentions


def test_layers_choose_blocks() -> None:
    adapter = gt.attach(FAMILIES["bert"].build(), gt.PTuningV2(layers=-1, train_head=False))
    assert {graft.place.module for graft in adapter.grafts} == {
        "bert.encoder.layer.1.attention.self"
    }


def test_grouped_heads_have_their_own_width() -> None:
    found: dict[str, Tensor] = gt.attach(FAMILIES["llama"].build(), DIRECT).state_dict()
    assert {tuple(tensor.shape) for tensor in found.values()} == {(3, 16)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 0}, "length is 0, expected at least 1"),
        ({"hidden": 0}, "hidden is 0, expected at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0, expected between 0 and 1"),
        ({"sublayers": ()}, r"sublayers is \[\], expected one or both of attention"),
        ({"sublayers": ("ffn",)}, r"sublayers is \['ffn'\]"),
        ({"sublayers": ("attention", "attention")}, "expected one or both"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.PrefixTuning(**settings)


def test_a_model_without_such_an_attention_is_refused() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(SettingsError, match=r"no block of this Bert\w+ has cross-attention"):
        gt.attach(model, gt.PrefixTuning(sublayers=("cross-attention",)))
    assert gt.adapters(model) == {}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("block", [0, 1])
def test_shifted_keys_have_the_biases_of_their_places_behind_the_prefix(
    stack: str, block: int
) -> None:
    model: Any = FAMILIES["t5"].build()
    method = gt.PrefixTuning(length=3, hidden=None, shift_keys=True)
    adapter = gt.attach(model, method, "task", seed=1)
    path = f"{stack}.block.{block}.layer.0.SelfAttention"
    host, first = (model.get_submodule(p) for p in (path, path.replace(f".{block}.", ".0.", 1)))
    seen: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        host.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: y})
        )
    host.o.register_forward_pre_hook(lambda _, args: seen.update(answer=args[0]))
    with torch.no_grad():
        model(**FAMILIES["t5"].inputs())
    own = {n.removeprefix(f"{path}.prefix."): t for n, t in adapter.state_dict().items()}
    heads, length = model.config.num_heads, seen["q"].shape[1]
    q, k, v = (seen[n][0].unflatten(-1, (heads, -1)).transpose(0, 1) for n in ("q", "k", "v"))
    before = [own[n].unflatten(-1, (heads, -1)).transpose(0, 1) for n in ("key", "value")]
    keys, values = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
    relative = torch.arange(length + 3)[None] - torch.arange(length)[:, None]
    buckets = host._relative_position_bucket(
        relative,
        bidirectional=stack == "encoder",
        num_buckets=model.config.relative_attention_num_buckets,
        max_distance=model.config.relative_attention_max_distance,
    )
    scores = q @ keys.transpose(1, 2) + first.relative_attention_bias(buckets).permute(2, 0, 1)
    if stack == "decoder":
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(torch.nn.functional.pad(hidden, (3, 0)), float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
    torch.testing.assert_close(seen["answer"][0], expected, atol=1e-5, rtol=1e-5)


def test_keys_are_shifted_for_the_adapters_that_ask_for_it_alone() -> None:
    model, inputs = FAMILIES["t5"].build(), FAMILIES["t5"].inputs()
    plain = gt.PrefixTuning(length=3, hidden=None)
    gt.attach(model, plain, "plain", seed=1)
    before = logits(model, inputs)
    gt.attach(model, gt.PrefixTuning(length=3, hidden=None, shift_keys=True), "shifted", seed=1)
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)
    gt.activate(model, "plain")
    assert torch.equal(logits(model, inputs), before)
    with pytest.raises(SettingsError, match="shift_keys is for attentions with relative biases"):
        gt.attach(FAMILIES["llama"].build(), gt.PrefixTuning(shift_keys=True), "task")


@pytest.mark.parametrize("family", ["gpt2", "bloom", "t5", "bert"])
def test_a_start_from_words_is_what_the_base_makes_of_them(family: str) -> None:
    model = FAMILIES[family].build()
    words = (7, 9, 4)
    method = gt.PrefixTuning(length=5, hidden=None, init_tokens=words)
    adapter = gt.attach(model, method, "task", seed=1)
    plain: Any = FAMILIES[family].build()
    ids = torch.tensor([[7, 9, 4, 7, 9]])
    more = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        states = plain(input_ids=ids, **more, output_hidden_states=True)
    own = {n: t for n, t in adapter.state_dict().items() if ".prefix." in n}
    if family == "bert":  # the first block sees the embeddings
        host = plain.bert.encoder.layer[0].attention.self
        h, name = states.hidden_states[0][0], "bert.encoder.layer.0.attention.self.prefix"
        expected = host.key(h), host.value(h)
    elif family == "gpt2":
        block = plain.transformer.h[1]
        h, name = block.ln_1(states.hidden_states[1][0]), "transformer.h.1.attn.prefix"
        expected = block.attn.c_attn(h).chunk(3, -1)[1:]
    elif family == "t5":
        block = plain.decoder.block[1].layer[1]
        h, name = (
            states.encoder_last_hidden_state[0],
            "decoder.block.1.layer.1.EncDecAttention.prefix",
        )
        expected = block.EncDecAttention.k(h), block.EncDecAttention.v(h)
    else:
        block = plain.transformer.h[0]
        h, name = (
            block.input_layernorm(states.hidden_states[0][0]),
            "transformer.h.0.self_attention.prefix",
        )
        heads = block.self_attention.query_key_value(h).unflatten(-1, (plain.config.n_head, 3, -1))
        expected = heads[..., 1, :].flatten(1), heads[..., 2, :].flatten(1)
    torch.testing.assert_close(own[f"{name}.key"], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own[f"{name}.value"], expected[1], atol=1e-5, rtol=1e-5)


ROTATED = ["llama", "qwen3", "gpt_neox", "phi3", "mixtral", "mistral", "gemma2"]


@pytest.mark.parametrize(
    ("family", "moved"),
    [*((f, m) for f in ROTATED for m in (False, True)), ("gpt2", True), ("opt", True)],
)
def test_after_a_start_from_words_text_answers_as_if_it_followed_them(
    family: str, moved: bool
) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    words = torch.tensor([[7, 9, 4, 7, 9]])
    whole = torch.cat([words.expand(2, -1), inputs["input_ids"]], 1)
    expected = logits(model, {"input_ids": whole})[:, 5:]
    alone = logits(model, inputs)
    method = gt.PrefixTuning(length=5, hidden=None, init_tokens=(7, 9, 4), shift_positions=moved)
    adapter = gt.attach(model, method, seed=1)
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert (alone - expected).abs().max() > 1e-2
    with torch.no_grad():
        cache = FAMILIES[family].build()(input_ids=words).past_key_values
    for graft in adapter.grafts[:2] if moved else ():
        layer = cache.layers[int("1" in graft.place.module)]
        for own, kept in ((graft.delta.key, layer.keys), (graft.delta.value, layer.values)):
            assert torch.equal(own, kept[0].transpose(0, 1).flatten(1))


def test_a_start_from_words_needs_words() -> None:
    with pytest.raises(SettingsError, match="set hidden=None"):
        gt.PrefixTuning(init_tokens=(1, 2))
    with pytest.raises(SettingsError, match=r"init_tokens is \[\], expected token ids"):
        gt.PrefixTuning(hidden=None, init_tokens=())
    method = gt.PrefixTuning(hidden=None, init_tokens=(10_000,))
    with pytest.raises(SettingsError, match="holds 10000, and the model has 99 tokens"):
        gt.attach(FAMILIES["bert"].build(), method, "task")
    with pytest.raises(SettingsError, match="for models that take token ids"):
        gt.attach(FAMILIES["vit"].build(), gt.PrefixTuning(hidden=None, init_tokens=(1,)), "task")
