"""A language model's loss in pieces: that of whole logits, which are never there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import graftune as gt
from graftune.errors import TrainingError
from graftune.methods.base import Method
from graftune.training.chunked_loss import chunked_loss, head_of
from graftune.training.deferred import Deferred
from tests.families import _LLAMA, FAMILIES, VOCABULARY
from tests.training.models import tiny
from tests.training.runs import args, curve

LANGUAGE = [n for n, f in FAMILIES.items() if f.kind in ("decoder", "encoder-decoder")]
SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "gemma3_text": {"final_logit_softcapping": 5.0, "head_dim": 8},
}
"""Families that do something to their logits, which is in none of FAMILIES."""
METHODS: dict[str, Method] = {
    "lora": gt.LoRA(r=2),
    "lora on the head": gt.LoRA(r=2, targets=["lm_head"]),
    "head": gt.LoRA(r=2, train_head=True),
    "full": gt.FullFineTuning(),
    "prompt": gt.PromptTuning(length=3),
}


def subject(family: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a language model in training, and a batch with padding and labels left out."""
    if family in SCALED:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **_LLAMA, **SCALED[family])
        model, like = AutoModelForCausalLM.from_config(config), FAMILIES["llama"]
    else:
        like = FAMILIES[family]
        model = like.build(**options)
    inputs: dict[str, Any] = like.inputs(padding=None if family == "whisper" else "right")
    inputs |= like.labels(model, inputs)
    inputs["labels"][1, :2] = -100
    return model.train(), inputs


def loss_and_gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch).loss
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), [torch.zeros(()) if g is None else g for g in found]


def assert_equal_in_pieces(model: nn.Module, batch: dict[str, Any], tokens: int) -> None:
    loss, gradients = loss_and_gradients(model, batch)
    with chunked_loss(model, tokens) as found:
        pieces, others = loss_and_gradients(model, batch)
    assert (found.calls, found.asked_whole) == (1, [])
    torch.testing.assert_close(pieces, loss, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*LANGUAGE, *SCALED])
def test_loss_and_gradients_are_those_of_whole_logits(family: str) -> None:
    model, batch = subject(family)
    gt.attach(model, METHODS["lora"], seed=0)
    assert_equal_in_pieces(model, batch, tokens=5)


@pytest.mark.parametrize("method", list(METHODS)[1:])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "gemma2"])
def test_every_gradient_passes_the_pieces(family: str, method: str) -> None:
    model, batch = subject(family)
    adapter = gt.attach(model, METHODS[method], seed=0)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(0.01)
    assert_equal_in_pieces(model, batch, tokens=3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_gets_both_gradients(tied: bool) -> None:
    model, batch = subject("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_equal_in_pieces(model, batch, tokens=1)


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_the_number_of_items_divides_the_sum(items: Any) -> None:
    model, batch = subject("llama")
    assert_equal_in_pieces(model, {**batch, "num_items_in_batch": items}, tokens=4)


def test_rows_of_several_adapters_each_have_their_own_head() -> None:
    model, batch = subject("llama")
    for seed, name in enumerate("ab"):
        adapter = gt.attach(
            model, gt.LoRA(r=2, targets=["lm_head"], init="gaussian"), name, seed=seed
        )
        with torch.no_grad():
            for tensor in adapter.parameters():
                tensor.add_(0.1)
    with gt.using(model, gt.Rows(["a", "b"])):
        assert_equal_in_pieces(model, batch, tokens=4)


def test_bfloat16_is_as_near_as_its_own_rounding() -> None:
    for family in ("llama", "t5"):
        model, batch = subject(family, dtype=torch.bfloat16)
        gt.attach(model, METHODS["lora"], seed=0)
        loss, gradients = loss_and_gradients(model, batch)
        with chunked_loss(model, 4):
            pieces, others = loss_and_gradients(model, batch)
        assert pieces.dtype == loss.dtype
        torch.testing.assert_close(pieces, loss, atol=0, rtol=1e-2)
        for one, other in zip(gradients, others, strict=True):
            assert (one - other).norm() <= 0.02 * one.norm() + 1e-6


def test_autocast_is_that_of_the_forward_pass() -> None:
    model, batch = subject("gpt2")
    gt.attach(model, METHODS["lora"], seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        with chunked_loss(model, 4):
            output = model(**batch)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, loss, atol=0, rtol=1e-3)
    output.loss.backward()  # outside of it


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Returns the bytes of what a pass saves that is as wide as the vocabulary."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.shape[-1:] == (VOCABULARY,):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "bart"])
def test_nothing_as_wide_as_the_vocabulary_is_kept(family: str) -> None:
    model, batch = subject(family)
    gt.attach(model, METHODS["lora"], seed=0)
    logits = 4 * batch["labels"].numel() * VOCABULARY
    assert saved_bytes(model, batch) >= logits
    with chunked_loss(model, 4):
        assert saved_bytes(model, batch) == 0


def test_no_piece_is_larger_than_asked() -> None:
    model, batch = subject("llama")
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out[..., 0].numel()))
    with chunked_loss(model, 6):
        model(**batch).loss.backward()
    assert max(sizes) == 6
    assert sum(sizes) == 2 * batch["labels"].numel() + len(batch["labels"])  # and one for the form


def test_the_backward_pass_sees_the_adapters_of_its_forward() -> None:
    model, batch = subject("llama")
    adapter = gt.attach(model, gt.LoRA(r=2, targets=["lm_head"], init="gaussian"), "task", seed=0)
    trained = list(adapter.parameters())
    with torch.no_grad():
        for tensor in trained:
            tensor.add_(0.1)
    expected = torch.autograd.grad(model(**batch).loss, trained)
    gt.activate(model, None)
    for tensor in trained:
        tensor.requires_grad_(True)
    with gt.using(model, "task"), chunked_loss(model, 4):
        loss = model(**batch).loss
    for one, other in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_logits_that_are_looked_at_are_whole_and_have_their_gradient() -> None:
    model, batch = subject("llama")
    with chunked_loss(model, 4) as found:
        output = model(**batch)
    assert isinstance(output.logits, Deferred)
    assert found.asked_whole == []
    plain = model(**batch)
    assert torch.equal(output.logits.argmax(-1), plain.logits.argmax(-1))
    assert found.asked_whole == ["argmax"]
    one, other = (
        torch.autograd.grad(logits.pow(2).mean(), model.lm_head.weight)[0]
        for logits in (output.logits, plain.logits)
    )
    torch.testing.assert_close(one, other)


def test_after_the_block_the_head_is_its_own_again() -> None:
    model, batch = subject("llama")
    expected = model.eval().generate(batch["input_ids"], max_new_tokens=4)
    with pytest.raises(ValueError, match="stop"), chunked_loss(model, 4):
        raise ValueError("stop")
    assert "_call_impl" not in model.lm_head.__dict__
    assert type(model(**batch).logits) is Tensor
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=4), expected)


def rows(family: str, count: int = 12) -> list[dict[str, Any]]:
    """Returns rows of texts, with answers of another length for encoder-decoders."""
    draw = torch.Generator().manual_seed(0)
    found: list[dict[str, Any]] = []
    for at in range(count):
        ids = torch.randint(5, VOCABULARY - 1, (6 + at % 5,), generator=draw).tolist()
        if FAMILIES[family].kind == "encoder-decoder":
            row = {"labels": ids[:4], "decoder_input_ids": [0, *ids[:3]]}
        else:
            row = {"labels": [-100, *ids[1:]]}
        found.append({"input_ids": ids, **row})
    return found


class Padded:
    """Pads ids with 0 and labels with -100."""

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        most = {name: max(len(row[name]) for row in batch) for name in batch[0]}
        fill = {"input_ids": 0, "labels": -100, "decoder_input_ids": 0}
        made = {
            name: torch.tensor(
                [r[name] + [fill[name]] * (most[name] - len(r[name])) for r in batch]
            )
            for name in most
        }
        return {**made, "attention_mask": (made["input_ids"] != 0).long()}


def run(folder: Path, family: str, loss_chunk: int | None, **settings: Any) -> gt.Trainer:
    model = FAMILIES[family].build(dropout=0.1)
    gt.attach(model, gt.LoRA(r=2, init="gaussian"), name="task", seed=0)
    return gt.Trainer(
        model,
        args(
            folder,
            **{"num_train_epochs": 1, "save_strategy": "no", **settings},
            remove_unused_columns=False,
        ),
        Padded(),
        train_dataset=rows(family),
        eval_dataset=rows(family, 4),
        loss_chunk=loss_chunk,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_a_run_has_the_curve_of_one_with_whole_logits(
    family: str, smoothing: float, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing}
    plain = run(tmp_path, family, None, **settings)
    plain.train()
    pieces = run(tmp_path, family, 5, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces.train()
    torch.testing.assert_close(
        torch.tensor(curve(pieces)), torch.tensor(curve(plain)), atol=1e-4, rtol=1e-4
    )
    assert plain.chunk_summary is None
    assert pieces.chunk_summary == (
        "The loss was computed 5 tokens at a time; logits were never whole."
    )
    assert pieces.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


class Reader:
    """Wraps a forward that reads or changes what its head answers."""

    def __init__(self, model: Any, what: Any) -> None:
        self.forward, self.what = model.forward, what

    def __call__(self, **batch: Any) -> Any:
        labels = batch.pop("labels")
        output = self.forward(**batch)
        logits = self.what(output.logits)
        output.loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return output


def written(logits: Tensor) -> Tensor:
    logits[..., 3] = 0.0
    return logits


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (written, "writes to its logits in place (__setitem__)"),
        (lambda logits: logits.mul_(2), "writes to its logits in place (mul_)"),
        (lambda logits: logits.softmax(-1), "asks for whole logits (softmax)"),
        (lambda logits: logits.flip(1), "asks for whole logits (flip)"),
    ],
)
def test_a_loss_that_can_not_be_in_pieces_is_computed_whole_and_said(
    what: Any, reason: str, tmp_path: Path
) -> None:
    found: list[Any] = []
    for chunk in (None, 5):
        trainer = run(tmp_path, "llama", chunk)
        trainer.model.forward = Reader(trainer.model, what)
        if chunk is None:
            trainer.train()
        else:
            with pytest.warns(UserWarning, match="loss_chunk is left out"):
                trainer.train()
            assert reason in str(trainer.chunk_summary)
        found.append(curve(trainer))
    assert found[0] == found[1]


def test_a_model_that_never_calls_its_head_is_told(tmp_path: Path) -> None:
    trainer = run(tmp_path, "llama", 5)
    model: Any = trainer.model
    head = model.lm_head

    def forward(labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        logits = model.model(**batch).last_hidden_state @ head.weight.T
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    model.forward = forward
    with pytest.warns(UserWarning, match="computes logits without calling its head"):
        trainer.train()


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Deferred._cross_entropy
    monkeypatch.setattr(Deferred, "_cross_entropy", lambda *a, **k: 1.01 * cut(*a, **k))
    trainer = run(tmp_path, "llama", 5)
    with pytest.warns(UserWarning, match=r"the loss of a few tokens is [\d.]+ whole and [\d.]+ so"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_chunk": 0}, "a number of tokens, at least 1, found 0"),
        ({"loss_chunk": True}, "found True"),
        ({"forward": lambda model, batch: model(**batch)}, "a loss of its own"),
        ({"args": {"torch_compile": True}}, "torch_compile"),
    ],
)
def test_what_does_not_go_with_it_is_refused_at_once(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {"loss_chunk": 5, **settings}
    chosen = args(tmp_path, **given.pop("args", {}))
    with pytest.raises(TrainingError, match=words):
        gt.Trainer(FAMILIES["gpt2"].build(), chosen, train_dataset=rows("gpt2"), **given)


def test_a_classifier_has_no_head_of_the_vocabulary() -> None:
    with pytest.raises(TrainingError, match="BertForSequenceClassification has no head of the voc"):
        head_of(tiny(), 5)
