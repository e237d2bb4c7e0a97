"""HF PEFT loads our prefixes and we load its: the same logits where its prefixes mean the same.

Where they don't, a test shows what PEFT computes instead.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.peft_types import obstacle
from graftune.sites.base import AttentionPlace
from tests.families import FAMILIES
from tests.parity.exchange import (
    answer,
    base,
    check_again,
    check_close,
    check_from_peft,
    check_own_form,
    check_to_peft,
    logits,
    peft,
    randomised,
    saved_by_peft,
)

DECODERS = [n for n, f in FAMILIES.items() if f.kind == "decoder" and n != "bloom"]
ENCODERS = ["bert", "roberta", "electra"]
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
WINDOWS = ["mistral", "gemma2"]
DIRECT = {"length": 4, "hidden": None, "sublayers": ("attention",), "shift_positions": True}


def config(family: str, **settings: Any) -> Any:
    given = {"num_virtual_tokens": 4, "task_type": TASKS.get(FAMILIES[family].kind)} | settings
    return peft.PrefixTuningConfig(**given)


@pytest.mark.parametrize("family", DECODERS)
def test_what_peft_writes_we_load(family: str, tmp_path: Path) -> None:
    adapter = check_from_peft(family, "default", config(family), tmp_path / "a")
    assert adapter.method.shift_positions
    assert len([g for g in adapter.grafts if isinstance(g.place, AttentionPlace)]) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_mlps_answer_is_what_peft_keeps_of_it(family: str, tmp_path: Path) -> None:
    task = "classification" if family == "bert" else "default"
    given = config(family, prefix_projection=True, encoder_hidden_size=8)
    if family == "bert":
        given.task_type = "SEQ_CLS"
    check_from_peft(family, task, given, tmp_path / "a")


@pytest.mark.parametrize("family", ["gpt2", "llama", *ENCODERS])
def test_a_classifier_of_peft_is_loaded_with_its_head(family: str, tmp_path: Path) -> None:
    given = config(family, task_type="SEQ_CLS")
    adapter = check_from_peft(family, "classification", given, tmp_path / "a")
    assert adapter.head_names


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma2"])
@pytest.mark.parametrize("kind", [gt.PrefixTuning, gt.PTuningV2])
def test_what_we_write_peft_loads(family: str, kind: Any, tmp_path: Path) -> None:
    check_to_peft(family, "default", kind(**DIRECT), tmp_path / "a")


@pytest.mark.parametrize("family", ["gpt2", "llama", *ENCODERS])
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(family: str, tmp_path: Path) -> None:
    method = gt.PrefixTuning(**DIRECT, train_head=["classifier" if family in ENCODERS else "score"])
    check_to_peft(family, "classification", method, tmp_path / "a")


def encoder(family: str, ending: str) -> Any:
    """Returns an encoder of a class that `FAMILIES` doesn't build."""
    name = FAMILIES[family].default.replace("ForSequenceClassification", ending)
    torch.manual_seed(0)
    return getattr(transformers, name)(FAMILIES[family].config()).eval()


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_answers_for_tokens_are_carried(family: str, tmp_path: Path) -> None:
    given = config(family, task_type="TOKEN_CLS")
    wrapped = peft.get_peft_model(encoder(family, "ForTokenClassification"), given)
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    model = encoder(family, "ForTokenClassification")
    inputs = FAMILIES[family].inputs(padding="right")
    plain = answer(model, inputs)
    gt.load(model, tmp_path / "a")
    real = inputs["attention_mask"].bool()
    check_close(answer(model, inputs)[real], answer(wrapped, inputs)[real], plain[real])


def test_finished_ones_are_written_for_peft_and_unfinished_ones_in_our_form(tmp_path: Path) -> None:
    model = base("llama", "default")
    plain = logits(model, "llama", "default")
    adapter = gt.attach(model, gt.PrefixTuning(**DIRECT | {"hidden": 8}))
    randomised(model)
    assert "keeps no MLP" in obstacle(adapter)
    adapter.save(tmp_path / "unfinished")
    check_again(adapter, "llama", "default", tmp_path / "unfinished")
    assert not gt.inspect(tmp_path / "unfinished").verdicts[0].loads
    adapter.finish()
    assert obstacle(adapter) == ""
    adapter.save(tmp_path / "finished")
    check_again(adapter, "llama", "default", tmp_path / "finished")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        wrapped = peft.PeftModel.from_pretrained(base("llama", "default"), tmp_path / "finished")
    ours = logits(model, "llama", "default")
    check_close(ours, logits(wrapped, "llama", "default"), plain)


def pair(family: str, path: Path) -> tuple[Any, Any]:
    """Returns PEFT's model and ours with the same prefix."""
    wrapped = peft.get_peft_model(base(family, "default"), config(family))
    randomised(wrapped)
    wrapped.save_pretrained(path)
    model = base(family, "default")
    gt.load(model, path)
    return wrapped.eval(), model.eval()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma2"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_both_generate_the_same(family: str, padding: Any, tmp_path: Path) -> None:
    theirs, ours = pair(family, tmp_path / "a")
    inputs = FAMILIES[family].inputs(padding=padding)
    inputs.pop("position_ids", None)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = ours.generate(**inputs, **settings)
    assert torch.equal(theirs.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_left_padded_rows_agree(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(family, tmp_path / "a")
    inputs = FAMILIES[family].inputs(padding="left")
    real = inputs["attention_mask"].bool()
    found = [answer(model, dict(inputs))[real] for model in (theirs, ours)]
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("family", WINDOWS)
def test_a_sliding_window_hides_pefts_prefix_and_not_ours(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(family, tmp_path / "a")
    text = FAMILIES[family].inputs(length=24)
    found = [answer(model, text) for model in (theirs, ours)]
    apart = (found[0] - found[1]).abs().amax((0, 2))
    assert apart[:12].max() < 1e-5  # 16 keys: 4 of the prefix, 12 of the text
    assert apart[13:].min() > 1e-4


# A decoder beside an encoder.


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_peft_gives_layer_i_the_pair_2i_and_leaves_pairs_out(layers: int) -> None:
    given = {"encoder_layers": layers, "decoder_layers": layers}
    model = peft.get_peft_model(FAMILIES["bart"].build(**given), config("bart")).eval()
    table = model.prompt_encoder["default"].embedding.weight
    inputs, width = FAMILIES["bart"].inputs(), table.shape[1] // (2 * layers)
    plain = answer(model, inputs)
    used = set()
    for at in range(layers):
        with torch.no_grad():
            table[:, 2 * at * width : 2 * (at + 1) * width] += 1
        changed = answer(model, inputs)
        if not torch.equal(changed, plain):
            used.add(at)
        plain = changed
    assert used == {2 * layer % layers for layer in range(layers)}


def test_an_encoder_decoders_are_refused(tmp_path: Path) -> None:
    saved_by_peft("bart", "default", config("bart"), tmp_path / "a")
    with pytest.raises(FormatError, match="share prefixes and leaves others out"):
        gt.load(base("bart", "default"), tmp_path / "a")


@pytest.mark.parametrize("family", ["t5", "bloom"])
def test_where_positions_bias_the_attention_pefts_prefixes_are_refused(
    family: str, tmp_path: Path
) -> None:
    saved_by_peft(family, "default", config(family), tmp_path / "a")
    with pytest.raises(FormatError, match="take positions, which bias the attention"):
        gt.load(base(family, "default"), tmp_path / "a")


# What PEFT can't hold.


NOT_IN_PEFT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no positions": ("llama", "default", {"shift_positions": False}, "shift_positions=True"),
    "one layer": ("llama", "default", {"layers": 0}, "in all self-attentions"),
    "an encoder-decoder": ("bart", "default", {"shift_positions": False}, "share prefixes"),
    "no cache": ("modernbert", "classification", {}, "this ModernBertForSequenceClass"),
    "no head": ("bert", "classification", {"train_head": False}, "and its heads"),
}


@pytest.mark.parametrize("name", NOT_IN_PEFT)
def test_what_peft_lacks_is_said_and_written_in_our_form(name: str, tmp_path: Path) -> None:
    family, task, settings, told = NOT_IN_PEFT[name]
    method = gt.PrefixTuning(**DIRECT | settings)
    adapter = check_own_form(family, method, tmp_path / "a", task)
    assert told in obstacle(adapter)


def test_a_table_of_another_width_is_refused(tmp_path: Path) -> None:
    saved_by_peft("llama", "default", config("llama"), tmp_path / "a")
    with pytest.raises(BaseMismatchError, match=r"\(4, 64\), this model needs \(4, 128\)"):
        gt.load(FAMILIES["llama"].build(num_key_value_heads=4), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_virtual_tokens": 0}))
    with pytest.raises(FormatError, match='"num_virtual_tokens" is 0'):
        gt.load(base("llama", "default"), tmp_path / "a")


def test_gradient_reaches_a_prefix_of_peft(tmp_path: Path) -> None:
    _, model = pair("llama", tmp_path / "a")
    found: Tensor = model(**FAMILIES["llama"].inputs()).logits.sum()
    found.backward()
    assert all(tensor.grad is not None for tensor in gt.adapters(model)["a"].parameters())
