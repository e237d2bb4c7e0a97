"""HF PEFT loads our prompts and we load its: the same logits wherever a prompt is what PEFT runs.

Where it isn't, a test shows what PEFT computes instead.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.peft_types import obstacle
from tests.families import FAMILIES
from tests.parity.exchange import (
    answer,
    base,
    check_close,
    check_from_peft,
    check_own_form,
    check_to_peft,
    peft,
    randomised,
    saved_by_peft,
)

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
SEQ2SEQ = ["t5", "mt5", "bart"]
ENCODERS = ["bert", "roberta", "electra", "deberta-v2", "modernbert"]
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
SOME = ["gpt2", "opt", "llama", "t5", "bart"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:Token type ids are not supported"),
]


def config(family: str, **settings: Any) -> Any:
    given = {"num_virtual_tokens": 4, "task_type": TASKS.get(FAMILIES[family].kind)} | settings
    return peft.PromptTuningConfig(**given)


@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_what_peft_writes_we_load(family: str, tmp_path: Path) -> None:
    adapter = check_from_peft(family, "default", config(family), tmp_path / "a")
    assert adapter.method.length == 4
    assert adapter.method.position == "front"


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_a_decoders_classifier_of_peft_is_loaded_with_its_head(family: str, tmp_path: Path) -> None:
    given = config(family, task_type="SEQ_CLS", prompt_tuning_init="SAMPLE_VOCAB")
    adapter = check_from_peft(family, "classification", given, tmp_path / "a")
    assert adapter.head_names == ("score",)


@pytest.mark.parametrize("settings", [{"num_transformer_submodules": 1}, {}], ids=["one", "two"])
def test_a_decoders_half_of_an_encoder_decoders_prompt_is_left_out(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = check_from_peft("t5", "default", config("t5", **settings), tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(file["prompt_embeddings"]) == (4 if settings else 8)
    [(_, tokens)] = adapter.named_tensors()
    assert torch.equal(tokens, file["prompt_embeddings"][:4])


TO_PEFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"init": "random", "length": 1},
    "text": {"init": "text", "init_tokens": [7, 8, 9], "position": "front"},
}


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("name", TO_PEFT)
def test_what_we_write_peft_loads(family: str, name: str, tmp_path: Path) -> None:
    method = gt.PromptTuning(**{"length": 4} | TO_PEFT[name])
    check_to_peft(family, "default", method, tmp_path / "a")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(family: str, tmp_path: Path) -> None:
    check_to_peft(family, "classification", gt.PromptTuning(length=4), tmp_path / "a")


def test_a_head_beside_a_prompt_is_carried_both_ways(tmp_path: Path) -> None:
    given = config("llama", modules_to_save=["lm_head", "model.norm"])
    adapter = check_from_peft("llama", "default", given, tmp_path / "a")
    assert adapter.head_names == ("model.norm", "lm_head")
    method = gt.PromptTuning(length=4, train_head=["lm_head", "model.norm"])
    check_to_peft("llama", "default", method, tmp_path / "b")


# Encoders: PEFT's answer for tokens is ours, its answer for the whole text isn't.


def encoder(family: str, ending: str) -> Any:
    """Returns an encoder of a class that `FAMILIES` doesn't build."""
    name = FAMILIES[family].default.replace("ForSequenceClassification", ending)
    torch.manual_seed(0)
    model = getattr(transformers, name)(FAMILIES[family].config(num_labels=2))
    return model.eval()


def encoders_answer(model: Any, family: str, has_types: bool = False) -> Tensor:
    inputs = FAMILIES[family].inputs(padding="right")
    if has_types:
        inputs["token_type_ids"] = inputs["input_ids"] % 2
    with torch.no_grad():
        found = model.eval()(**inputs)
    first = torch.stack([found[0], found[1]], -1) if "start_logits" in found else found[0]
    real = inputs["attention_mask"].bool()
    return first[:, -real.shape[1] :][real]


FOR_TOKENS = [
    *((family, "ForTokenClassification", "TOKEN_CLS") for family in ENCODERS),
    *((family, "ForQuestionAnswering", "QUESTION_ANS") for family in ENCODERS[:-1]),
]


@pytest.mark.parametrize(("family", "ending", "task"), FOR_TOKENS)
def test_an_encoders_answers_for_tokens_are_carried_both_ways(
    family: str, ending: str, task: str, tmp_path: Path
) -> None:
    wrapped = peft.get_peft_model(encoder(family, ending), config(family, task_type=task))
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = encoders_answer(wrapped, family)
    model = encoder(family, ending)
    plain = encoders_answer(model, family)
    adapter = gt.load(model, tmp_path / "theirs")
    check_close(encoders_answer(model, family), theirs, plain)
    adapter.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = peft.PeftModel.from_pretrained(encoder(family, ending), tmp_path / "ours")
    check_close(encoders_answer(again, family), encoders_answer(model, family), plain)


def test_token_types_are_followed_for_tokens_and_lost_in_peft_for_answers(tmp_path: Path) -> None:
    for ending, task in (("ForTokenClassification", "TOKEN_CLS"), FOR_TOKENS[-1][1:]):
        given = config("bert", task_type=task)
        wrapped = peft.get_peft_model(encoder("bert", ending), given)
        wrapped.save_pretrained(tmp_path / task)
        model = encoder("bert", ending)
        gt.load(model, tmp_path / task)
        theirs, ours = (encoders_answer(m, "bert", has_types=True) for m in (wrapped, model))
        assert torch.allclose(theirs, ours, atol=1e-6) == (task == "TOKEN_CLS")
        assert not torch.allclose(ours, encoders_answer(model, "bert"), atol=1e-2)
        if task == "QUESTION_ANS":
            assert torch.equal(theirs, encoders_answer(wrapped, "bert"))


def test_a_bare_encoders_states_are_carried_both_ways(tmp_path: Path) -> None:
    model = encoder("electra", "Model")
    plain = encoders_answer(model, "electra")
    adapter = gt.attach(model, gt.PromptTuning(length=4, position="front"))
    assert json.loads((adapter.save(tmp_path / "a") / "adapter_config.json").read_text())[
        "task_type"
    ] == ("FEATURE_EXTRACTION")
    wrapped = peft.PeftModel.from_pretrained(encoder("electra", "Model"), tmp_path / "a")
    check_close(encoders_answer(model, "electra"), encoders_answer(wrapped, "electra"), plain)
    wrapped.save_pretrained(tmp_path / "b")
    again = encoder("electra", "Model")
    gt.load(again, tmp_path / "b")
    assert torch.equal(encoders_answer(again, "electra"), encoders_answer(model, "electra"))


def test_a_bare_encoders_pooled_answer_is_that_of_a_virtual_token_in_peft(tmp_path: Path) -> None:
    given = config("bert", task_type="FEATURE_EXTRACTION")
    wrapped = peft.get_peft_model(encoder("bert", "Model"), given)
    wrapped.save_pretrained(tmp_path / "a")
    model = encoder("bert", "Model")
    gt.load(model, tmp_path / "a")
    inputs = FAMILIES["bert"].inputs()
    with torch.no_grad():
        ours, theirs = model(**inputs), wrapped.eval()(**inputs)
        states = theirs.last_hidden_state
        assert torch.allclose(ours.last_hidden_state, states[:, 4:], atol=1e-6)
        assert torch.allclose(theirs.pooler_output, model.pooler(states), atol=1e-6)
        assert torch.allclose(ours.pooler_output, model.pooler(states[:, 4:]), atol=1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_classifier_reads_a_virtual_token_as_in_peft(
    family: str, tmp_path: Path
) -> None:
    given = config(family, task_type="SEQ_CLS")
    adapter = check_from_peft(family, "classification", given, tmp_path / "a")
    assert adapter.method.stays
    assert adapter.head_names
    method = gt.PromptTuning(length=4, position="front", stays=True)
    check_to_peft(family, "classification", method, tmp_path / "b")


def test_what_peft_reads_for_cls_is_the_state_of_the_first_virtual_token(tmp_path: Path) -> None:
    theirs = saved_by_peft(
        "bert", "classification", config("bert", task_type="SEQ_CLS"), tmp_path / "a"
    )
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    model = base("bert", "classification")
    head = {k.removeprefix("base_model.classifier."): t for k, t in file.items() if "classif" in k}
    model.classifier.load_state_dict(head)
    inputs = FAMILIES["bert"].inputs()
    tokens = model.get_input_embeddings()(inputs["input_ids"])
    prompt = file["prompt_embeddings"].expand(2, -1, -1)
    found = model.bert(inputs_embeds=torch.cat([prompt, tokens], dim=1)).last_hidden_state
    of_first_virtual = model.classifier(model.bert.pooler(found[:, :1]))
    assert torch.allclose(of_first_virtual, theirs, atol=1e-6)


# Padding: rows that PEFT computes otherwise than alone.


def padded(family: str, padding: Any, task: str = "default") -> dict[str, Tensor]:
    inputs = FAMILIES[family].inputs(padding=padding, task=task)  # type: ignore[arg-type]
    return {k: v for k, v in inputs.items() if k != "position_ids"}


def pair(family: str, path: Path, task: str = "default") -> tuple[Any, Any]:
    """Returns PEFT's model and ours with the same prompt."""
    given = config(family, task_type="SEQ_CLS") if task != "default" else config(family)
    wrapped = peft.get_peft_model(base(family, task), given)
    randomised(wrapped)
    wrapped.save_pretrained(path)
    model = base(family, task)
    gt.load(model, path)
    return wrapped.eval(), model.eval()


FINDS_POSITIONS_IN_THE_MASK = ("opt", "bloom")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bloom", "llama", "t5", "mt5"])
def test_left_padded_rows_are_as_alone_here_and_in_peft_where_positions_come_from_the_mask(
    family: str, tmp_path: Path
) -> None:
    theirs, ours = pair(family, tmp_path / "a")
    whole = FAMILIES[family].inputs(padding="left")
    real = whole["attention_mask"][0].bool()
    alone = {k: v[:1, real] if k != "decoder_input_ids" else v[:1] for k, v in whole.items()}
    alone.pop("position_ids", None)
    n = -int(real.sum()) if "decoder_input_ids" not in whole else 0
    expected = answer(ours, alone)
    assert torch.allclose(answer(theirs, alone), expected, atol=1e-6)
    assert torch.allclose(answer(ours, whole)[:1, n:], expected, atol=1e-5)
    differs = (answer(theirs, padded(family, "left"))[:1, n:] - expected).abs().max()
    assert (differs < 1e-5) == (family in FINDS_POSITIONS_IN_THE_MASK)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifier_of_a_right_padded_row_reads_padding_in_peft(
    family: str, tmp_path: Path
) -> None:
    theirs, ours = pair(family, tmp_path / "a", "classification")
    inputs = padded(family, "right", "classification")
    alone = {name: tensor[:1, :5] for name, tensor in inputs.items()}
    assert torch.allclose(answer(theirs, alone), answer(ours, alone), atol=1e-6)
    assert torch.allclose(answer(ours, inputs)[:1], answer(ours, alone), atol=1e-5)
    assert (answer(theirs, inputs)[:1] - answer(ours, alone)).abs().max() > 1e-2


@pytest.mark.parametrize("family", [*SOME, "gemma2", "bloom"])
def test_both_generate_the_same(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(family, tmp_path / "a")
    inputs = padded(family, None)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = ours.generate(**inputs, **settings)
    assert torch.equal(theirs.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_both_generate_the_same_padded_left_where_positions_come_from_the_mask(
    family: str, tmp_path: Path
) -> None:
    theirs, ours = pair(family, tmp_path / "a")
    inputs = padded(family, "left")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = ours.generate(**inputs, **settings)
    assert torch.equal(theirs.generate(**inputs, **settings), expected)


# What PEFT can't hold.


NOT_IN_PEFT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "after the first token": ("bert", "default", {}, "this one follows the first token"),
    "after the first, decoder": ("llama", "default", {"position": "after-first"}, "follows"),
    "an encoder's classifier": (
        *("bert", "default"),
        *({"position": "front"}, "read the first virtual token (stays=True)"),
    ),
    "behind the embeddings": ("bert", "default", {"enters": "blocks"}, "enters behind their emb"),
    "images": ("vit", "default", {}, "enters behind their embeddings"),
    "a classifier with its head left alone": (
        *("llama", "classification"),
        *({"train_head": False}, "has none for this LlamaForSequenceClassification and its heads"),
    ),
    "a head tied to the embeddings": (
        *("gpt2", "default"),
        *({"train_head": ["lm_head"]}, "looks tokens up in the base's embeddings"),
    ),
    "an encoder-decoder's classifier": ("bart", "classification", {}, "has none for this Bart"),
}


@pytest.mark.parametrize("name", NOT_IN_PEFT)
def test_what_peft_lacks_is_said_and_written_in_our_form(name: str, tmp_path: Path) -> None:
    family, task, settings, told = NOT_IN_PEFT[name]
    method = gt.PromptTuning(length=4, **settings)
    adapter = check_own_form(family, method, tmp_path / "a", task)
    assert told in obstacle(adapter)


def test_a_table_of_another_length_is_refused(tmp_path: Path) -> None:
    saved_by_peft("llama", "default", config("llama"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    content = json.loads(file.read_text())
    for length, told, kind in (
        (5, r"\(4, 32\), this model needs \(5, 32\)", BaseMismatchError),
        (None, r'"num_virtual_tokens" is None', FormatError),
        (True, r'"num_virtual_tokens" is True', FormatError),
    ):
        file.write_text(json.dumps(content | {"num_virtual_tokens": length}))
        with pytest.raises(kind, match=told):
            gt.load(base("llama", "default"), tmp_path / "a")


def test_a_prompt_of_ours_goes_below_another_head(tmp_path: Path) -> None:
    model = base("llama", "classification")
    adapter = gt.attach(model, gt.PromptTuning(length=4))
    adapter.save(tmp_path / "a")
    fresh = base("llama", "default")
    loaded = gt.load(fresh, tmp_path / "a", head=False, check_base=False)
    assert loaded.head_names == ()
    assert torch.equal(next(loaded.parameters()), next(adapter.parameters()))
