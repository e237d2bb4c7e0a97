"""Ladder Side-Tuning: counts, the equation written out, pruning, memory, caches, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, T5Config, T5ForConditionalGeneration

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.sites.places import TrunkPlace
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def t5_base() -> nn.Module:
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def attached(family: str, **settings: Any) -> tuple[nn.Module, dict[str, Tensor], gt.Adapter]:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    method = gt.LadderSideTuning(**{"reduction": 2, **settings})
    return model, inputs, gt.attach(model, method, seed=1)


@pytest.mark.parametrize(
    ("drop", "expected"), [((0, 4, 8), 3_878_712), ((), 5_097_240)], ids=["drops", "whole"]
)
def test_t5_base_counts_as_the_paper(drop: tuple[int, ...], expected: int) -> None:
    model = t5_base()
    adapter = gt.attach(model, gt.LadderSideTuning(drop=drop))
    assert adapter.count() == expected
    assert adapter.method.count(model, adapter.anatomy) == expected


def test_it_answers_as_the_equation_written_out() -> None:
    model, inputs, adapter = attached("bert", drop=(0,))
    shake(adapter, 3)
    host: Any = model.bert
    side: Any = adapter.grafts[0].delta
    answer = host(**inputs).last_hidden_state
    gt.activate(model, None)
    mask = torch.zeros(len(inputs["input_ids"]), 1, 1, inputs["input_ids"].shape[1])
    mask = mask.masked_fill(inputs["attention_mask"][:, None, None] == 0, -torch.inf)
    e = h = host.embeddings(inputs["input_ids"], inputs.get("token_type_ids"))
    for block in host.encoder.layer:
        h = block(h, mask)
    s = F.linear(e, side.enter_weight, side.enter_bias)
    mu = torch.sigmoid(side.gates[1] / 0.1)
    s = mu * s + (1 - mu) * F.linear(h, side.down_weight[0], side.down_bias[0])
    plain = type(side.body.encoder.layer[0])(side.body.config).eval()
    plain.load_state_dict(side.body.encoder.layer[0].state_dict())
    expected = F.linear(plain(s, mask), side.up_weight, side.up_bias)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


def test_a_gate_wide_open_to_the_side_makes_it_blind_to_the_blocks() -> None:
    model, inputs, adapter = attached("llama")
    before = logits(model, inputs)
    with torch.no_grad():
        adapter.grafts[0].delta.gates.fill_(1e4)
        alone = logits(model, inputs)
        for block in model.get_submodule("model.layers").children():
            block.mlp.down_proj.weight.add_(0.5)
    assert not torch.equal(before, alone)
    assert torch.equal(alone, logits(model, inputs))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
def test_added_to_the_trunk_it_starts_as_the_base(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    before = logits(model, inputs)
    gt.attach(model, gt.LadderSideTuning(reduction=2, ending="add"))
    assert torch.equal(before, logits(model, inputs))


PRUNED = [name for name in FAMILIES if name not in ("mixtral", "swin", "clip")]


@pytest.mark.parametrize("family", PRUNED)
def test_pruned_by_nothing_a_side_block_is_the_trunks(family: str) -> None:
    model, _, adapter = attached(family, reduction=1)
    for graft in adapter.grafts:
        if not isinstance(graft.place, TrunkPlace):
            continue  # of a head
        own = dict(graft.delta.body.named_parameters())
        trunk = dict(model.get_submodule(graft.place.module).named_parameters())
        inside = len(f"{graft.place.module}.") if graft.place.module else 0
        blocks = tuple(f"{path[inside:]}." for path in graft.place.blocks)
        names = [name for name in own if name.startswith(blocks)]
        assert names
        assert all(torch.equal(own[name], trunk[name]) for name in names)


def test_pruning_keeps_the_features_with_the_largest_weights() -> None:
    model = FAMILIES["bert"].build()
    layers: list[Any] = list(model.get_submodule("bert.encoder.layer").children())
    layer = layers[0]
    kept = torch.tensor([1, 4, 5, 9, 12, 13, 14, 17, 20, 21, 22, 25, 28, 29, 30, 31])
    units = torch.arange(0, 128, 2)
    with torch.no_grad():
        for block in layers:
            for linear in block.modules():
                if isinstance(linear, nn.Linear) and linear.in_features == 32:
                    linear.weight[:, kept] += 5.0
        for one in layers:
            one.intermediate.dense.weight[units] += 9.0
    adapter = gt.attach(model, gt.LadderSideTuning(reduction=2))
    side = adapter.grafts[0].delta.body.encoder.layer[0]
    assert torch.equal(
        side.intermediate.dense.weight, layer.intermediate.dense.weight[units][:, kept]
    )
    assert torch.equal(side.output.dense.weight, layer.output.dense.weight[kept][:, units])
    assert torch.equal(side.intermediate.dense.bias, layer.intermediate.dense.bias[units])


def test_rotated_keys_keep_the_places_whose_angles_a_small_head_has() -> None:
    model, _, adapter = attached("llama")
    side = adapter.grafts[0].delta.body
    wide, narrow = model.model.rotary_emb.inv_freq, side.rotary_emb.inv_freq
    torch.testing.assert_close(wide[::2], narrow)
    query = model.model.layers[0].self_attn.q_proj.weight
    pruned = side.layers[0].self_attn.q_proj.weight
    columns = [
        next(i for i in range(32) if torch.equal(query[::2, i], pruned[:, at])) for at in range(16)
    ]
    assert columns == sorted(columns)


def test_fisher_pruning_looks_at_data() -> None:
    kind = FAMILIES["bert"]
    model, inputs = kind.build(), kind.inputs()
    data = [{**inputs, **kind.labels(model, inputs)}]
    method = gt.LadderSideTuning(reduction=2, init="fisher")
    with pytest.raises(SettingsError, match="looks at data"):
        gt.attach(model, method)
    one = gt.attach(model, method, "fisher", data=data)
    two = gt.attach(model, gt.LadderSideTuning(reduction=2), "magnitude")
    weights = [
        a.grafts[0].delta.body.encoder.layer[0].intermediate.dense.weight for a in (one, two)
    ]
    assert not torch.equal(*weights)
    assert not any(p.grad is not None for p in model.parameters())


def saved_bytes(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, list[torch.Size]]:
    """Returns the bytes of activations kept for backward, and their shapes."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Size]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    return sum(size for size, _ in kept.values()), [shape for _, shape in kept.values()]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_no_activation_inside_the_trunks_blocks_is_kept(family: str) -> None:
    kind = FAMILIES[family]
    model, inputs, adapter = attached(family)
    graphs: list[bool] = []
    for block in adapter.anatomy.blocks:
        module = model.get_submodule(block.path)
        module.register_forward_hook(
            lambda m, a, out: graphs.append((out if torch.is_tensor(out) else out[0]).requires_grad)
        )
    model.train()
    _, shapes = saved_bytes(model, {**inputs, **kind.labels(model, inputs)})
    assert graphs == [False] * len(adapter.anatomy.blocks)
    inner = {block.width * 4 for block in adapter.anatomy.blocks} | {80}
    assert not any(shape and shape[-1] in inner for shape in shapes)


def test_no_attention_weights_of_the_side_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FAMILIES["t5"]
    model, inputs, adapter = attached("t5")
    inputs = {**inputs, **kind.labels(model, inputs)}
    ladder: Any = adapter.grafts[0].delta
    found: dict[bool, tuple[list[torch.Size], list[Tensor | None]]] = {}
    for again in (True, False):
        for graft in adapter.grafts:
            monkeypatch.setattr(graft.delta, "has_bias", again)
        model.train()
        model.zero_grad()
        _, shapes = saved_bytes(model, inputs)
        found[again] = shapes, [p.grad for p in model.parameters() if p.requires_grad]
    rows, tokens = inputs["input_ids"].shape
    weights = (rows * ladder.config.num_heads, tokens, tokens)
    assert weights not in found[True][0]
    assert weights in found[False][0]
    for again, once in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(again, once)


def test_it_keeps_far_less_for_backward_than_lora() -> None:
    from transformers import BertForSequenceClassification

    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    ids = torch.randint(0, 1000, (8, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": torch.zeros(8, dtype=torch.long)}
    found: dict[str, int] = {}
    for method in (gt.LoRA(), gt.LadderSideTuning()):
        model = BertForSequenceClassification(config)
        gt.attach(model, method)
        model.train()
        found[method.name], _ = saved_bytes(model, inputs)
    assert found["LadderSideTuning"] < 0.35 * found["LoRA"]


def test_the_trunk_drops_nothing_out_unless_asked() -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    from transformers import BertModel

    for asked in (False, True):
        model = BertModel(config, add_pooling_layer=False)
        gt.attach(model, gt.LadderSideTuning(reduction=2, dropout=0.5, trunk_dropout=asked))
        seen: list[Tensor] = []
        model.encoder.layer[1].register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out if torch.is_tensor(out) else out[0])
        )
        model.train()
        ids = torch.arange(8)[None]
        one, two = model(ids).last_hidden_state, model(ids).last_hidden_state
        assert torch.equal(*seen) is not asked
        assert not torch.equal(one, two)  # the side does
        assert all(m.training for m in model.modules())


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.generates])
def test_it_generates_with_every_cache_as_without(family: str) -> None:
    model, inputs, adapter = attached(family, init="random")
    shake(adapter, 2)
    given = {k: v for k, v in inputs.items() if "decoder" not in k}
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = model.generate(**given, **options, use_cache=False)
    for cached in ({}, {"cache_implementation": "static"}):
        made = model.generate(**given, **options, **cached)
        for left, right in zip(plain.logits, made.logits, strict=True):
            torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)
    beams: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(
        model.generate(**given, **beams, use_cache=False), model.generate(**given, **beams)
    )


def test_a_cache_that_its_side_never_saw_is_refused() -> None:
    model, inputs, _ = attached("llama")
    with torch.no_grad():
        gt.activate(model, None)
        cache = model(**inputs, use_cache=True).past_key_values
        gt.activate(model, "default")
        with pytest.raises(AdapterError, match=r"the side of \"default\" did not see"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


def test_states_of_an_encoder_that_ran_without_it_are_refused() -> None:
    model, inputs, _ = attached("t5")
    with torch.no_grad():
        gt.activate(model, None)
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        gt.activate(model, "default")
        with pytest.raises(AdapterError, match="run the encoder under the adapter"):
            model(encoder_outputs=encoded, decoder_input_ids=inputs["input_ids"][:, :3])


def test_a_failing_pass_leaves_gradients_and_modes_as_they_were() -> None:
    model, inputs, _ = attached("bert")
    model.train()

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("on purpose")

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        model(**inputs)
    handle.remove()
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    assert model(**inputs).logits.requires_grad


def test_hidden_states_that_are_asked_for_are_the_trunks() -> None:
    model, inputs, _ = attached("bert")
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True).hidden_states
        gt.activate(model, None)
        base = model(**inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(base) == 3
    assert all(torch.equal(left, right) for left, right in zip(found, base, strict=True))


def test_an_adapter_in_the_trunk_changes_what_the_side_sees() -> None:
    model, inputs, ladder = attached("gpt2")
    lora = gt.attach(model, gt.LoRA(r=2), "lora")
    shake(lora, 4)
    gt.activate(model, "default")
    alone = logits(model, inputs)
    gt.activate(model, gt.Stack("lora", "default"))
    assert not torch.allclose(alone, logits(model, inputs))
    assert ladder.count()


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("bert", {"reduction": 3}, "doesn't divide hidden_size=32"),
        ("bert", {"reduction": 16}, "leaves a width of 2 for the 4 heads"),
        ("bert", {"drop": (0, 7)}, "drop names block 7, but bert.encoder.layer has 2"),
        ("bert", {"drop": (0, 1)}, "drop leaves no block"),
        ("bert", {"init": "magnitud"}, "expected one of magnitude, fisher, random"),
        ("mixtral", {}, 'set init="random"'),
        ("swin", {}, "differ in width"),
        ("clip", {}, "text, vision"),
    ],
)
def test_what_does_not_fit_is_said(family: str, settings: dict[str, Any], words: str) -> None:
    model = FAMILIES[family].build()
    before = dict(model.named_modules())
    with pytest.raises(SettingsError, match=words):
        gt.attach(model, gt.LadderSideTuning(**{"reduction": 2, **settings}))
    assert dict(model.named_modules()) == before
