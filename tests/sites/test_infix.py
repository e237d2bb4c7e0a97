"""Infixes: keys and values between prompt and answer, that the prompt doesn't see."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from tests.contract.subjects import logits
from tests.families import FAMILIES

DECODERS = [n for n, f in FAMILIES.items() if f.kind == "decoder"]
KINDS = ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "mixtral", "opt"]
WINDOWS = ["mistral", "gemma2"]
SETTINGS: dict[str, Any] = {"length": 3, "hidden": None, "position": "infix", "train_head": False}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def infixed(family: str, **options: Any) -> tuple[Any, gt.Adapter]:
    """Returns a model with an infix."""
    model = FAMILIES[family].build(**options)
    return model, gt.attach(model, gt.PrefixTuning(**SETTINGS), "a", seed=1)


def one_query_at_a_time(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as the definition has it: each query softmaxes over what it sees, one by one."""
    p_k, p_v, at = module.kept
    rows, heads, length, size = query.shape
    groups, out = heads // key.shape[1], torch.zeros_like(query)
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                seen = (attention_mask[b if len(attention_mask) > 1 else 0, 0, t] == 0).nonzero()
                own = slice(h // groups * size, (h // groups + 1) * size)
                keys, values = key[b, h // groups, seen[:, 0]], value[b, h // groups, seen[:, 0]]
                if t >= at[b]:
                    keys = torch.cat([keys, p_k[:, own]])
                    values = torch.cat([values, p_v[:, own]])
                scores = keys @ query[b, h, t] * scaling
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[b, h, t] = scores.softmax(0) @ values
    return out.transpose(1, 2), None


@pytest.fixture
def known() -> Iterator[None]:
    """The plain form is among transformers' attentions, in one test alone."""
    AttentionInterface.register("one_query", one_query_at_a_time)
    AttentionMaskInterface.register("one_query", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        registry._global_mapping.pop("one_query")


def plain(family: str, adapter: gt.Adapter, at: list[int], **options: Any) -> nn.Module:
    """Returns a fresh base of which row b's tokens see the infix from number at[b] on."""
    model: Any = FAMILIES[family].build(attn_implementation="one_query", **options)
    for graft in adapter.grafts[:-1]:
        delta: Any = graft.delta
        host: Any = model.get_submodule(graft.place.module)
        host.kept = (delta.key.detach(), delta.value.detach(), at)
    return model


def labelled(inputs: dict[str, Tensor], *firsts: int) -> dict[str, Tensor]:
    """Returns inputs with labels, in row b from number firsts[b] on."""
    labels = inputs["input_ids"].clone()
    for row, first in enumerate(firsts):
        labels[row, :first] = -100
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [*KINDS, *WINDOWS])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.usefixtures("known")
def test_the_answer_and_what_predicts_it_see_the_infix_alone(family: str, padding: Any) -> None:
    options = {"sliding_window": 4} if family in WINDOWS else {}
    model, adapter = infixed(family, **options)
    inputs = FAMILIES[family].inputs(length=9, padding=padding)
    real = inputs["attention_mask"].bool()
    got = logits(model, labelled(inputs, 5, 7))
    close(got[real], logits(plain(family, adapter, [4, 6], **options), inputs)[real])
    close(logits(model, {**inputs, "infix_at": torch.tensor([5, 7])})[real], got[real])
    gt.activate(model, None)
    base = logits(model, inputs)
    for row, first in enumerate((4, 6)):
        kept = real[row, :first]
        close(got[row, :first][kept], base[row, :first][kept])
        assert (got[row, first:] - base[row, first:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_a_prefix_is_an_infix_after_nothing(family: str) -> None:
    model, adapter = infixed(family)
    inputs = FAMILIES[family].inputs()
    front = gt.attach(model, gt.PrefixTuning(**SETTINGS | {"position": "front"}), "front")
    front.load_state_dict(adapter.state_dict())
    expected = logits(model, inputs)
    gt.activate(model, "a")
    close(logits(model, {**inputs, "labels": inputs["input_ids"]}), expected)
    assert torch.equal(logits(model, {**inputs, "infix_at": 0}), expected)
    whole = logits(model, {**inputs, "infix_at": 8})
    gt.activate(model, None)
    assert torch.equal(whole, logits(model, inputs))


@pytest.mark.parametrize("family", DECODERS)
def test_rows_that_begin_at_different_places_answer_as_alone(family: str) -> None:
    model, _ = infixed(family)
    inputs = labelled(FAMILIES[family].inputs(batch=3, length=9), 4, 7, 20)  # the last has none
    together = logits(model, inputs)
    for row in range(3):
        alone = logits(model, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
        close(together[row], alone[0])
    gt.activate(model, None)
    close(together[2], logits(model, inputs)[2])


def by_hand(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Returns greedy tokens of whole passes, each told where the answer begins."""
    length = ids.shape[1]
    for _ in range(steps):
        found = logits(model, {"input_ids": ids, "infix_at": length})  # type: ignore[dict-item]
        ids = torch.cat([ids, found[:, -1:].argmax(-1)], 1)
    return ids


WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 4},
    "chunks of all but one": {"prefill_chunk_size": 6},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", *WINDOWS])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_generated_is_the_answer_however_it_is_generated(family: str, way: str) -> None:
    options: dict[str, Any] = {"sliding_window": 4} if family in WINDOWS else {}
    model, _ = infixed(family, **options)
    ids = FAMILIES[family].inputs()["input_ids"]
    settings = {**GREEDY, **WAYS[way], "output_logits": True, "return_dict_in_generate": True}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    if way == "beams":
        again = model.generate(ids, use_cache=False, **settings)
        assert torch.equal(got.sequences, again.sequences)
        return
    assert torch.equal(got.sequences, by_hand(model, ids, 5))
    whole = logits(model, {"input_ids": got.sequences, "infix_at": 7})  # type: ignore[dict-item]
    close(torch.stack(got.logits, 1), whole[:, 6:-1])
    before = logits(model, {"input_ids": got.sequences, "infix_at": 99})  # type: ignore[dict-item]
    assert (before[:, 6:-1] - whole[:, 6:-1]).abs().amax(-1).min() > 1e-3


def test_rows_padded_left_generate_what_they_do_alone() -> None:
    model, _ = infixed("llama")
    inputs = FAMILIES["llama"].inputs(padding="left")
    inputs.pop("position_ids")
    together = model.generate(**inputs, **GREEDY)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model.generate(inputs["input_ids"][row : row + 1, mask], **GREEDY)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_an_answer_that_is_given_in_part_is_said_so() -> None:
    model, _ = infixed("llama")
    ids = FAMILIES["llama"].inputs()["input_ids"]
    whole = model.generate(ids, **GREEDY)
    rest = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(whole[:, :9], infix_at=7, **rest), whole)
    at = torch.tensor([7, 7])
    assert torch.equal(model.generate(whole[:, :9], infix_at=at, **rest), whole)


def test_a_prompt_beside_it_counts_as_the_text_it_precedes() -> None:
    model, _ = infixed("llama")
    prompt = gt.attach(model, gt.PromptTuning(length=4), "prompt", seed=2)
    inputs = FAMILIES["llama"].inputs(padding="left")
    inputs.pop("position_ids")
    with gt.using(model, gt.Stack("a", "prompt")):
        cached = model.generate(**inputs, **GREEDY, prefill_chunk_size=4)
        assert torch.equal(cached, model.generate(**inputs, **GREEDY))
        whole = logits(model, {**inputs, "infix_at": 6})  # type: ignore[dict-item]
    gt.activate(model, prompt.name)
    close(whole[1, :5], logits(model, inputs)[1, :5])


def test_one_row_may_have_an_infix_and_another_none() -> None:
    model, _ = infixed("llama")
    gt.attach(model, gt.PrefixTuning(**SETTINGS | {"position": "front", "length": 2}), "front")
    inputs = labelled(FAMILIES["llama"].inputs(batch=4), 3, 4, 5, 2)
    members = ["a", None, "front", "a"]
    with gt.using(model, gt.Rows(members)):
        mixed = logits(model, inputs)
    for row, member in enumerate(members):
        with gt.using(model, member):
            alone = logits(model, {name: t[row : row + 1] for name, t in inputs.items()})
        close(mixed[row], alone[0])
    with gt.using(model, gt.Parallel("a", "front")):
        both = logits(model, inputs).chunk(2)
    for member, got in zip(("a", "front"), both, strict=True):
        with gt.using(model, member):
            close(got, logits(model, inputs))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_functions_agree(attention: str) -> None:
    inputs = labelled(FAMILIES["llama"].inputs(padding="left"), 4, 5)
    real = inputs["attention_mask"].bool()
    expected = logits(infixed("llama")[0], inputs)[real]
    with torch.compiler.set_stance("force_eager"):
        got = logits(infixed("llama", attn_implementation=attention)[0], inputs)[real]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(family: str, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model, adapter = infixed(family)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**labelled(FAMILIES[family].inputs(), 3, 5)).loss.backward()
        found.append([tensor.grad for tensor in adapter.parameters()])
    for left, right in zip(*found, strict=True):
        assert left is not None
        assert left.abs().sum() > 0
        torch.testing.assert_close(left, right)


def test_one_token_of_answer_teaches_the_infix() -> None:
    model, adapter = infixed("llama")
    model(**labelled(FAMILIES["llama"].inputs(), 6, 6)).loss.backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in adapter.parameters())


def test_gates_and_the_mlp_work_in_it_and_it_is_saved_in_our_form(tmp_path: Path) -> None:
    method = gt.PrefixTuning(**SETTINGS | {"hidden": 8, "gate": "token"})
    model, inputs = FAMILIES["llama"].build(), labelled(FAMILIES["llama"].inputs(), 3, 5)
    adapter = gt.attach(model, method, "a", seed=1)
    expected = logits(model, inputs)
    adapter.finish()
    assert torch.equal(logits(model, inputs), expected)
    adapter.save(tmp_path / "a")
    fresh = FAMILIES["llama"].build()
    assert gt.load(fresh, tmp_path / "a").method == method
    assert torch.equal(logits(fresh, inputs), expected)
    assert not gt.inspect(tmp_path / "a").verdicts[0].loads
    base = logits(FAMILIES["llama"].build(), inputs)
    close(expected[0, :2], base[0, :2])
    assert (expected[0, 2:] - base[0, 2:]).abs().amax(-1).min() > 1e-4


def test_copies_and_pickles_generate_by_themselves_and_off_it_the_class_does() -> None:
    model, adapter = infixed("llama")
    ids = FAMILIES["llama"].inputs()["input_ids"]
    expected = model.generate(ids, **GREEDY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(ids, **GREEDY), expected)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    gt.activate(model, None)
    base = model.generate(ids, **GREEDY)
    gt.detach(model, adapter.name)
    assert "generate" not in model.__dict__
    assert not hasattr(model, "deltas")
    assert torch.equal(model.generate(ids, **GREEDY), base)


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_models_without_a_prompt_before_an_answer_are_refused(family: str) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(
        SettingsError, match=r'position="infix" is for causal decoders, .* has blocks of '
    ):
        gt.attach(model, gt.PrefixTuning(**SETTINGS))
    assert gt.adapters(model) == {}


@pytest.mark.parametrize("setting", ["shift_keys", "shift_positions"])
def test_it_moves_no_tokens(setting: str) -> None:
    with pytest.raises(SettingsError, match='position="infix" moves no tokens'):
        gt.PrefixTuning(**{**SETTINGS, setting: True})


def test_a_pass_that_doesnt_say_where_the_answer_begins_is_refused() -> None:
    model, _ = infixed("llama")
    inputs = FAMILIES["llama"].inputs()
    with pytest.raises(AdapterError, match="found no labels: pass labels"):
        model(**inputs)
    with pytest.raises(AdapterError, match="in a part of the model that was run by itself"):
        model.model(**inputs)
    for at in (-1, [1, 2, 3], 0.5):
        with pytest.raises(AdapterError, match="expected a number of tokens, or one for each of 2"):
            model(**inputs, infix_at=at)
    model(**inputs, infix_at=3)
    with pytest.raises(AdapterError, match="found no labels"):
        model(**inputs)  # what one pass was told isn't kept for the next
    classifier = FAMILIES["llama"].build(task="classification")
    gt.attach(classifier, gt.PrefixTuning(**SETTINGS))
    with pytest.raises(AdapterError, match=r"found labels of \(2,\)"):
        classifier(**inputs, labels=torch.tensor([0, 1]))
    gt.activate(model, None)
    model(**inputs)
