"""Soft prompts and prefixes in every way that `generate` reads a text and gives its answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError
from graftune.sites.woven import Woven
from tests.families import FAMILIES

DECODERS = tuple(f for f in FAMILIES if FAMILIES[f].kind == "decoder")
METHODS: dict[str, Any] = {
    "prompt": lambda: gt.PromptTuning(length=3),
    "ptuning": lambda: gt.PTuning(length=3),
    "multitask": lambda: gt.MultitaskPromptTuning(length=3),
    "prefix": lambda: gt.PrefixTuning(length=3),
    "ptuningv2": lambda: gt.PTuningV2(length=3),
    "llamaadapter": lambda: gt.LLaMAAdapter(length=3),
}
SHORT: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "output_scores": True,
    "return_dict_in_generate": True,
}


class Listener:
    """Keeps what a streamer is told."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, value: Tensor) -> None:
        """See transformers' `BaseStreamer.put`."""
        self.heard += value.reshape(-1).tolist()

    def end(self) -> None:
        """See transformers' `BaseStreamer.end`."""


def trained(family: str, method: str) -> tuple[Any, dict[str, Tensor]]:
    """Returns a model with an adapter that matters, and a batch padded on the left."""
    torch.manual_seed(0)
    model: Any = FAMILIES[family].build()
    adapter = gt.attach(model, METHODS[method]())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    inputs = FAMILIES[family].inputs(padding="left")
    return model, {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}


def scores(answer: Any) -> Tensor:
    """Returns every step's scores, `(steps, B, vocabulary)`, what is forbidden 0."""
    made = torch.stack(answer.scores)
    return made.masked_fill(made.isinf(), 0.0)


def same(got: Any, expected: Any) -> bool:
    difference = (scores(got) - scores(expected)).abs().max().item()
    return torch.equal(got.sequences, expected.sequences) and difference < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DECODERS)
def test_a_text_read_in_chunks_is_the_text_read_at_once(family: str, method: str) -> None:
    model, inputs = trained(family, method)
    for row in inputs["attention_mask"]:
        row[: 3 if row[0] == 0 else 0] = 0  # so that a whole chunk is padding
    whole = model.generate(**inputs, **SHORT)
    assert same(model.generate(**inputs, **SHORT, prefill_chunk_size=3), whole)


@pytest.mark.parametrize("method", METHODS)
def test_a_streamer_hears_no_virtual_token(method: str) -> None:
    model, inputs = trained("llama", method)
    one = {name: value[:1] for name, value in inputs.items()}
    listener = Listener()
    answer = model.generate(**one, **SHORT, streamer=listener)
    assert listener.heard == answer.sequences[0].tolist()


def test_rows_under_different_methods_are_each_row_alone() -> None:
    model, inputs = trained("llama", "prompt")
    members: list[str | None] = ["default", None]
    for name in ("ptuning", "prefix", "ptuningv2", "llamaadapter"):
        gt.attach(model, METHODS[name](), name=name)
        members.append(name)
    rows = {name: value[:1].repeat(len(members), 1) for name, value in inputs.items()}
    with gt.using(model, gt.Rows(members)):
        mixed = model.generate(**rows, **SHORT, prefill_chunk_size=3)
    for row, member in enumerate(members):
        with gt.using(model, member):
            alone = model.generate(**{k: v[:1] for k, v in rows.items()}, **SHORT)
        assert torch.equal(mixed.sequences[row], alone.sequences[0])
        assert (scores(mixed)[:, row] - scores(alone)[:, 0]).abs().max() < 1e-4


def test_a_prompt_after_the_first_token_needs_it_in_the_first_chunk() -> None:
    model: Any = FAMILIES["llama"].build()
    gt.attach(model, gt.PromptTuning(length=3, position="after-first"))
    inputs = FAMILIES["llama"].inputs()
    inputs["attention_mask"][0, :4] = 0
    with pytest.raises(AdapterError, match="larger prefill_chunk_size"):
        model.generate(**inputs, **SHORT, prefill_chunk_size=3)
    model.generate(**inputs, **SHORT, prefill_chunk_size=5)


def test_a_generated_token_looks_once_where_the_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = FAMILIES["llama"].build()
    gt.attach(model, gt.PromptTuning(length=3, position="after-first"))
    looked: list[int | None] = []
    at = Woven.at

    def counted(self: Woven, mask: Any, rows: int, device: Any, known: Any = None) -> Tensor:
        looked.append(known)
        return at(self, mask, rows, device, known)

    monkeypatch.setattr(Woven, "at", counted)
    model.generate(**FAMILIES["llama"].inputs(padding="left"), **SHORT)
    assert looked == [None, 7, 7, 7]  # as it comes in, and by each token after it
