"""Virtual tokens among the words of CLIP's text tower, which takes ids alone (CoOp)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from tests.contract.subjects import shake
from tests.families import FAMILIES
from tests.sites.test_embedding import WORDS, close, of_words, spelled


def made() -> tuple[Any, dict[str, Tensor]]:
    """Returns a model of both towers, and a batch whose first text is padded."""
    return FAMILIES["clip"].build(), FAMILIES["clip"].inputs(padding="right")


def texts(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Returns what the text tower answers."""
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.text_model(**own)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("position", [None, "front", "after-first"])
def test_words_in_the_prompt_are_words_in_the_text(position: Any, legacy: bool) -> None:
    model, inputs = made()
    if legacy:
        model.text_model.eos_token_id = 2  # pools the highest id
    at = int(position != "front")
    expected = texts(model, spelled(inputs, [at, at]))
    gt.attach(model, of_words(position=position, where="text"), name="words")
    got = texts(model, inputs)
    assert close(got.pooler_output, expected.pooler_output)
    kept = torch.cat([expected[0][:, :at], expected[0][:, at + 3 :]], dim=1)
    shown = inputs["attention_mask"].bool()
    assert close(got.last_hidden_state[shown], kept[shown])


def test_images_stay_as_they_are() -> None:
    model, inputs = made()
    base = model(**inputs)
    adapter = gt.attach(model, gt.PTuning(length=3, where="text"), name="a", seed=1)
    shake(adapter, 1, 0.5)
    said = model(**inputs, return_loss=True)
    assert torch.equal(said.image_embeds, base.image_embeds)
    assert (said.text_embeds - base.text_embeds).abs().max() > 1e-3
    said.loss.backward()
    assert all(tensor.grad is not None for tensor in adapter.parameters())
    gt.activate(model, None)
    assert torch.equal(model(**inputs).text_embeds, base.text_embeds)


def test_rows_and_tasks_of_their_own() -> None:
    model, inputs = made()
    gt.attach(model, of_words(where="text"), name="long")
    gt.attach(model, of_words((31,), where="text"), name="short")
    with gt.using(model, gt.Rows(["short", "long"])):
        mixed = texts(model, inputs).pooler_output
    for row, member in enumerate(("short", "long")):
        with gt.using(model, member):
            assert close(texts(model, inputs).pooler_output[row], mixed[row])


def test_where_a_marker_stands() -> None:
    model, inputs = made()
    whole = spelled(inputs, [2, 2])
    expected = texts(model, whole).pooler_output
    adapter = gt.attach(model, gt.PTuning(length=3, encoder="none", where="text", marker=50))
    tokens = model.text_model.get_input_embeddings()(torch.tensor(WORDS)).detach()
    adapter.load_state_dict({"text_model.prompt.tokens": tokens})
    marked = spelled(inputs, [2, 2], (50, 50, 50))
    assert close(texts(model, marked).pooler_output, expected)


def test_the_tower_alone_and_its_room(tmp_path: Any) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    model: Any = CLIPTextModel(
        CLIPTextConfig(
            **settings,
            num_attention_heads=4,
            vocab_size=99,
            eos_token_id=98,
            max_position_embeddings=12,
        )
    ).eval()
    ids = torch.randint(5, 98, (2, 8))
    ids[:, -1] = 98
    adapter = gt.attach(model, gt.PromptTuning(length=3))
    out = model(input_ids=ids)
    adapter.save(tmp_path / "a")
    gt.activate(model, None)
    gt.load(model, tmp_path / "a", name="again")
    assert torch.equal(model(input_ids=ids).pooler_output, out.pooler_output)
    with pytest.raises(AdapterError, match="more than the 12 positions"):
        model(input_ids=torch.cat([ids, ids], dim=1))
    with pytest.raises(SettingsError, match="leaves no room"):
        gt.attach(model, gt.PromptTuning(length=12), name="b")
