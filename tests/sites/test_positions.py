"""Real tokens that stand later by a prefix's length: what the base answers at those positions."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import graftune as gt
from graftune.errors import AdapterError, FormatError, SettingsError
from graftune.formats.adapterhub import writing
from tests.contract.subjects import logits
from tests.families import FAMILIES

POSITIONED = ("llama", "gpt2", "opt", "qwen3", "gpt_neox", "bert", "roberta", "modernbert")


def prefixed(family: str, *lengths: int, shift: bool = True, **options: Any) -> Any:
    """Returns a model with prefixes "a", "b", ... of some lengths, the last one active."""
    model = FAMILIES[family].build(**options)
    for at, (n, name) in enumerate(zip(lengths, "abc", strict=False)):
        method = gt.PrefixTuning(length=n, hidden=None, train_head=False, shift_positions=shift)
        gt.attach(model, method, name, seed=at)
    return model


def later(family: str, inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Returns the inputs with positions that begin at `by`."""
    ids = inputs["input_ids"]
    first = 1 if family == "roberta" else 0  # its padding is position 0
    positions = torch.arange(ids.shape[1])[None].expand(ids.shape) + first + by
    return {**inputs, "position_ids": positions}


@pytest.mark.parametrize("family", POSITIONED)
def test_it_is_the_prefix_with_later_positions(family: str) -> None:
    inputs = FAMILIES[family].inputs()
    got = logits(prefixed(family, 3), inputs)
    still = prefixed(family, 3, shift=False)
    assert torch.equal(got, logits(still, later(family, inputs, 3)))
    if family not in ("llama", "qwen3", "gpt_neox", "modernbert"):  # rotations see distances alone
        assert not torch.allclose(got, logits(still, inputs))


@pytest.mark.parametrize("family", POSITIONED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_that_row_alone(family: str, side: Any) -> None:
    if side == "left" and family in ("bert", "roberta", "modernbert"):
        return  # they pool the first position
    model, inputs = prefixed(family, 3), FAMILIES[family].inputs(padding=side)
    together = logits(model, inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        one = {name: tensor[row : row + 1, mask] for name, tensor in inputs.items()}
        whole = together[row][mask] if FAMILIES[family].kind == "decoder" else together[row]
        alone = logits(model, one)[0]
        torch.testing.assert_close(whole, alone, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generating_goes_on_where_the_text_ended(family: str, beams: int) -> None:
    model, inputs = prefixed(family, 3), FAMILIES[family].inputs(padding="left")
    inputs.pop("position_ids", None)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), together)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model.generate(inputs["input_ids"][row : row + 1, mask], **options)
        assert torch.equal(together[row, -5:], alone[0, -5:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_cache_token_by_token_is_one_pass(family: str) -> None:
    model, inputs = prefixed(family, 3), FAMILIES[family].inputs()
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(7):
            ids = inputs["input_ids"][:, at : at + 1]
            steps.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, inputs), atol=2e-6, rtol=1e-5)


def test_embedded_tokens_are_moved_too() -> None:
    model, inputs = prefixed("gpt2", 3), FAMILIES["gpt2"].inputs()
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    got = logits(model, {"inputs_embeds": embedded, "attention_mask": mask})
    assert torch.equal(got, logits(model, inputs))


def test_active_prefixes_add_up_and_rows_have_their_own() -> None:
    model, inputs = prefixed("gpt2", 3, 2), FAMILIES["gpt2"].inputs(batch=4)
    still = prefixed("gpt2", 3, 2, shift=False)
    members = {"a": 3, "b": 2, gt.Stack("a", "b"): 5, None: 0}
    for member, by in members.items():
        with gt.using(model, member), gt.using(still, member):
            got = logits(model, inputs)
            assert torch.equal(got, logits(still, later("gpt2", inputs, by)))
    with gt.using(model, gt.Rows(list(members))):
        mixed = logits(model, inputs)
    for row, member in enumerate(members):
        with gt.using(model, member):
            alone = logits(model, {name: t[row : row + 1] for name, t in inputs.items()})[0]
        torch.testing.assert_close(mixed[row], alone, atol=2e-6, rtol=1e-5)


def test_an_average_takes_prefixes_of_one_length() -> None:
    model, inputs = prefixed("gpt2", 3, 3, 2), FAMILIES["gpt2"].inputs()
    still = prefixed("gpt2", 3, 3, shift=False)
    mean = gt.Average("a", "b")
    with gt.using(model, mean), gt.using(still, mean):
        assert torch.equal(logits(model, inputs), logits(still, later("gpt2", inputs, 3)))
    with (
        gt.using(model, gt.Average("a", "c")),
        pytest.raises(AdapterError, match="move them by 2, 3"),
    ):
        logits(model, inputs)


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_more_tokens_than_positions_are_refused(family: str) -> None:
    sizes = {"n_positions": 8} if family == "gpt2" else {"max_position_embeddings": 9}
    model = prefixed(family, 3, **sizes)
    logits(model, FAMILIES[family].inputs(length=5))
    with pytest.raises(AdapterError, match=r"6 tokens and prefixes that take 3 positions .* the 8"):
        logits(model, FAMILIES[family].inputs(length=6))


@pytest.mark.parametrize("family", ["t5", "bloom", "bart", "vit", "whisper", "clip"])
def test_a_model_that_is_told_no_positions_is_refused(family: str) -> None:
    model = FAMILIES[family].build()
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(SettingsError, match=r"shift_positions .*takes no position_ids"):
        gt.attach(model, gt.PrefixTuning(shift_positions=True))
    assert [name for name, _ in model.named_modules()] == modules


def test_it_is_copied_saved_and_taken_off(tmp_path: Path) -> None:
    model, inputs = prefixed("gpt2", 3), FAMILIES["gpt2"].inputs()
    expected, adapter = logits(model, inputs), gt.adapters(model)["a"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
    with pytest.raises(FormatError, match="AdapterHub's prefixes take no positions"):
        writing.save(adapter, tmp_path / "theirs")
    adapter.save(tmp_path / "a")
    fresh = FAMILIES["gpt2"].build()
    assert gt.load(fresh, tmp_path / "a").method == adapter.method
    assert torch.equal(logits(fresh, inputs), expected)
    gt.activate(model, None)
    gt.detach(model, "a")
    assert torch.equal(logits(model, inputs), logits(FAMILIES["gpt2"].build(), inputs))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_mlp_that_is_dropped_leaves_the_positions() -> None:
    model, inputs = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].inputs()
    adapter = gt.attach(model, gt.PrefixTuning(length=3, hidden=8, shift_positions=True))
    expected = logits(model, inputs)
    adapter.finish()
    assert torch.equal(logits(model, inputs), expected)


def test_it_compiles() -> None:
    model, inputs = prefixed("gpt2", 3), FAMILIES["gpt2"].inputs()
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
