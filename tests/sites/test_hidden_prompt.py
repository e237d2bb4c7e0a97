"""Virtual tokens behind the embedding layer: what blocks and heads then see, in text and images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def attached(family: str, **settings: Any) -> tuple[Any, Tensor]:
    model = FAMILIES[family].build()
    method = gt.PromptTuning(length=3, enters="blocks", train_head=False, **settings)
    adapter = gt.attach(model, method, "task", seed=1)
    shake(adapter, 1, 0.5)
    return model, next(t for n, t in adapter.state_dict().items() if n.endswith("prompt.tokens"))


def by_hand(
    family: str, model: Any, prompt: Tensor, inputs: dict[str, Tensor], after: int, stays: bool
) -> Tensor:
    """Returns the logits with blocks run on a longer sequence, one row at a time, no mask."""
    body, rows = model.base_model, []
    embedded = body.embeddings(next(iter(inputs.values())))
    for row in range(len(embedded)):
        real = embedded[row]
        if "attention_mask" in inputs:
            real = real[inputs["attention_mask"][row].bool()]
        states = torch.cat([real[:after], prompt, real[after:]])[None]
        for block in body.layers if family == "vit" else body.encoder.layer:
            states = block(states)
            states = states[0] if isinstance(states, tuple) else states
        first = 0 if stays or after else len(prompt)
        if family == "vit":
            rows.append(model.classifier(body.layernorm(states)[:, first]))
        elif family == "bert":
            rows.append(model.classifier(body.pooler(states[:, first:])))
        else:
            rows.append(model.classifier(states[:, first:]))
    return torch.cat(rows)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("position", ["front", "after-first"])
@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_blocks_see_the_longer_sequence(family: str, position: str, stays: bool) -> None:
    model, prompt = attached(family, position=position, stays=stays)
    inputs = FAMILIES[family].inputs(padding=None if family == "vit" else "right")
    found = logits(model, inputs)
    with gt.using(model, None), torch.no_grad():
        expected = by_hand(family, model, prompt, inputs, int(position == "after-first"), stays)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_states_are_as_many_as_without() -> None:
    model, _ = attached("vit")
    inputs = FAMILIES["vit"].inputs()
    with gt.using(model, None):
        base = model(**inputs, output_hidden_states=True)
    states = model(**inputs, output_hidden_states=True)
    assert states.logits.shape == base.logits.shape
    assert len(states.hidden_states) == len(base.hidden_states)


def test_images_get_them_there_by_default() -> None:
    adapter = gt.attach(FAMILIES["vit"].build(), gt.PromptTuning(length=5), "task", seed=0)
    tensors = {n: tuple(t.shape) for n, t in adapter.state_dict().items() if "prompt" in n}
    assert tensors == {"vit.prompt.tokens": (5, 32)}
    with pytest.raises(SettingsError, match="images have no tokens to start from"):
        gt.attach(
            FAMILIES["vit"].build(),
            gt.PromptTuning(length=2, init="text", init_tokens=(1, 2)),
            "task",
        )


def test_what_cant_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"known to fit models of type bert, .*found llama"):
        gt.attach(FAMILIES["llama"].build(), gt.PromptTuning(enters="blocks"), "task")
    with pytest.raises(SettingsError, match=r"stays=True is for encoders.* made of a decoder"):
        gt.attach(FAMILIES["llama"].build(), gt.PromptTuning(stays=True), "task")
    with pytest.raises(SettingsError, match='Did you mean "blocks"'):
        gt.PromptTuning(enters="block")
    model, _ = attached("bert")
    gt.attach(model, gt.PromptTuning(length=3, enters="blocks", stays=True), "other", seed=0)
    gt.activate(model, gt.Stack("task", "other"))
    with pytest.raises(AdapterError, match=r"all stay in the answer, or none \(stays=\)"):
        logits(model, FAMILIES["bert"].inputs())


def test_rows_may_have_other_ones_of_the_same_length() -> None:
    model, _ = attached("vit")
    other = gt.attach(model, gt.PromptTuning(length=3), "other", seed=3)
    shake(other, 4, 0.5)
    inputs = FAMILIES["vit"].inputs(batch=2)
    with gt.using(model, gt.Rows(["other", "task"])):
        mixed = logits(model, inputs)
    for row, name in enumerate(["other", "task"]):
        with gt.using(model, name):
            torch.testing.assert_close(mixed[row], logits(model, inputs)[row], atol=1e-6, rtol=0)
    with pytest.raises(AdapterError, match="prompts of one length"):
        gt.activate(model, gt.Rows(["other", None]))


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    model, _ = attached("vit", stays=True)
    again = FAMILIES["vit"].build()
    gt.load(again, gt.adapters(model)["task"].save(tmp_path / "a"))
    inputs = FAMILIES["vit"].inputs()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
