"""Virtual tokens behind the embedding layer: what blocks and heads then see, in text and images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

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


IMAGE: dict[str, Any] = {
    **{"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 64, "num_labels": 3},
}
OF_IMAGES: dict[str, Any] = {
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**IMAGE)),
    "vit_msn": lambda: ViTMSNForImageClassification(ViTMSNConfig(**IMAGE)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**IMAGE)),
    "registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**IMAGE)
    ),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGE)),
    "clip-classifier": lambda: FAMILIES["clip"].build("classification"),
    "beit": lambda: BeitForImageClassification(BeitConfig(**IMAGE)),
    "beit-biases": lambda: BeitForImageClassification(
        BeitConfig(**IMAGE, use_relative_position_bias=True)
    ),
    "beit-shared": lambda: BeitForImageClassification(
        BeitConfig(**IMAGE, use_shared_relative_position_bias=True, use_mean_pooling=False)
    ),
}


def longer_by_hand(model: Any, prompt: Tensor, images: Tensor) -> Tensor:
    """Returns the last states of a body whose blocks run on patches and prompt, without it."""
    body = model.base_model if hasattr(model.base_model, "embeddings") else model.vision_model
    made = body.embeddings(images)
    if hasattr(body, "pre_layrnorm"):
        made = body.pre_layrnorm(made)
    states = torch.cat([made[:, :1], prompt.expand(len(made), -1, -1), made[:, 1:]], 1)
    encoder = getattr(body, "encoder", body)
    for block in getattr(encoder, "layer", None) or encoder.layers:
        options: dict[str, Any] = {"attention_mask": None}
        own = getattr(block, "relative_position_bias", None)
        maker = own or getattr(body, "shared_position_bias", None)
        if maker is not None:
            biases = maker((2, 2))
            wide = biases.new_zeros(1, biases.shape[1], 5 + len(prompt), 5 + len(prompt))
            real = torch.tensor([0, *range(1 + len(prompt), 5 + len(prompt))])
            wide[:, :, real[:, None], real] = biases
            options = {"attention_mask": wide}
            block.relative_position_bias = None
        states = block(states, **options)
        states = states[0] if isinstance(states, tuple) else states
        block.relative_position_bias = own
    norm = getattr(body, "layernorm", None)
    states = states if norm is None else norm(states)
    return torch.cat([states[:, :1], states[:, 1 + len(prompt) :]], dim=1)


def with_prompt(kind: str, **settings: Any) -> tuple[Any, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OF_IMAGES[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter = gt.attach(model, gt.PromptTuning(length=3, train_head=False, **settings), "task")
    return model, next(iter(adapter.parameters()))


@pytest.mark.parametrize("position", [None, "front"])
@pytest.mark.parametrize("kind", OF_IMAGES)
def test_images_are_read_with_the_prompt_among_their_patches(kind: str, position: Any) -> None:
    model, prompt = with_prompt(kind, position=position)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    body: Any = model.base_model if hasattr(model.base_model, "embeddings") else model.vision_model
    with torch.no_grad():
        out = body(pixel_values=images, output_hidden_states=True)
        with gt.using(model, None):
            base = body(pixel_values=images)
            expected = longer_by_hand(model, prompt, images)
    assert out.last_hidden_state.shape == base.last_hidden_state.shape == expected.shape
    torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert {h.shape for h in out.hidden_states} == {expected.shape}
    pooler = getattr(body, "pooler", None)
    if pooler is not None:
        torch.testing.assert_close(out.pooler_output, pooler(expected), atol=1e-5, rtol=1e-5)
    if kind == "clip":
        first = body.post_layernorm(expected[:, 0])
        torch.testing.assert_close(out.pooler_output, first, atol=1e-5, rtol=1e-5)


def test_positions_between_patches_are_those_of_patches_alone() -> None:
    model, _ = with_prompt("beit-biases")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    inputs: dict[str, Any] = {"pixel_values": images}
    between = logits(model, {**inputs, "interpolate_pos_encoding": True})
    torch.testing.assert_close(between, logits(model, inputs), atol=1e-6, rtol=1e-5)


def test_the_images_of_two_towers() -> None:
    model, inputs = FAMILIES["clip"].build(), FAMILIES["clip"].inputs()
    base = model(**inputs)
    adapter = gt.attach(model, gt.PromptTuning(length=3, where="vision"), "task", seed=1)
    shake(adapter, 1, 0.5)
    said = model(**inputs)
    assert list(adapter.state_dict()) == ["vision_model.prompt.tokens"]
    assert torch.equal(said.text_embeds, base.text_embeds)
    assert (said.image_embeds - base.image_embeds).abs().max() > 1e-3
    model(**inputs, return_loss=True).loss.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in adapter.parameters())


@pytest.mark.parametrize(
    ("family", "task", "words"),
    [
        ("clip", "default", 'say which, with where="text" or, of PromptTuning, where="vision"'),
        ("swin", "default", "see windows of the grid of patches"),
        ("whisper", "classification", "reads sound, which has no tokens"),
    ],
)
def test_why_there_is_no_place_is_said(family: str, task: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.attach(FAMILIES[family].build(task), gt.PromptTuning(length=3), "task")


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
