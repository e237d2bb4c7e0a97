"""HF PEFT loads our multitask prompts and we load its: the same logits for every row's task."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.peft_types import obstacle
from tests.families import FAMILIES
from tests.parity.exchange import answer, base, check_close, check_own_form, peft

TASKS = torch.tensor([2, 0])
DECODERS = ["gpt2", "opt", "bloom", "llama"]


def config(**settings: Any) -> Any:
    given = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2, "task_type": "CAUSAL_LM"}
    return peft.MultitaskPromptTuningConfig(**given | settings)


def drawn(module: torch.nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.requires_grad:
                tensor.normal_()


def of_tasks(model: torch.nn.Module, family: str, task: str = "default") -> Tensor:
    inputs = FAMILIES[family].inputs(task=task)  # type: ignore[arg-type]
    return answer(model, {**inputs, "task_ids": TASKS})


def written(family: str, path: Path, task: str = "default", **settings: Any) -> Any:
    wrapped = peft.get_peft_model(base(family, task), config(**settings))
    drawn(wrapped)
    wrapped.save_pretrained(path)
    return wrapped


@pytest.mark.parametrize("family", DECODERS)
def test_what_peft_writes_we_load_and_write_again(family: str, tmp_path: Path) -> None:
    theirs = of_tasks(written(family, tmp_path / "a"), family)
    model = base(family, "default")
    inputs = FAMILIES[family].inputs()
    plain = answer(model, inputs)
    adapter = gt.load(model, tmp_path / "a")
    assert (adapter.method.tasks, adapter.method.r) == (3, 2)
    check_close(of_tasks(model, family), theirs, plain)
    adapter.save(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = peft.PeftModel.from_pretrained(base(family, "default"), tmp_path / "b")
    check_close(of_tasks(again, family), theirs, plain)
    fresh = base(family, "default")
    loaded = gt.load(fresh, tmp_path / "b")
    assert loaded.method == adapter.method
    assert torch.equal(of_tasks(fresh, family), of_tasks(model, family))


def test_a_decoders_classifier_is_carried_with_its_head(tmp_path: Path) -> None:
    wrapped = written("llama", tmp_path / "a", "classification", task_type="SEQ_CLS")
    model = base("llama", "classification")
    plain = answer(model, FAMILIES["llama"].inputs(task="classification"))
    adapter = gt.load(model, tmp_path / "a")
    assert adapter.head_names == ("score",)
    theirs = of_tasks(wrapped, "llama", "classification")
    check_close(of_tasks(model, "llama", "classification"), theirs, plain)
    assert obstacle(adapter) == ""


def test_an_encoders_classifier_is_carried_with_its_head(tmp_path: Path) -> None:
    wrapped = written("bert", tmp_path / "a", "classification", task_type="SEQ_CLS")
    model = base("bert", "classification")
    plain = answer(model, FAMILIES["bert"].inputs(task="classification"))
    gt.load(model, tmp_path / "a")
    theirs = of_tasks(wrapped, "bert", "classification")
    check_close(of_tasks(model, "bert", "classification"), theirs, plain)


def seq2seq(model: Any) -> Tensor:
    inputs = FAMILIES["t5"].inputs()
    labels = torch.arange(10, 20).view(2, 5)
    with torch.no_grad():
        return model.eval()(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            task_ids=TASKS,
        ).logits


def test_an_encoders_prompt_alone_is_carried(tmp_path: Path) -> None:
    given = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}
    wrapped = written("t5", tmp_path / "a", **given)
    model = base("t5", "default")
    adapter = gt.load(model, tmp_path / "a")
    assert torch.allclose(seq2seq(model), seq2seq(wrapped), atol=1e-6)
    adapter.save(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(base("t5", "default"), tmp_path / "b")
    assert torch.allclose(seq2seq(again), seq2seq(model), atol=1e-6)


def test_a_decoders_second_prompt_is_left_out_of_generate_by_peft_and_refused(
    tmp_path: Path,
) -> None:
    wrapped = written("t5", tmp_path / "a", task_type="SEQ_2_SEQ_LM").eval()
    prompts = wrapped.prompt_encoder["default"].embedding.weight
    inputs = FAMILIES["t5"].inputs()
    inputs.pop("decoder_input_ids")
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "task_ids": TASKS}
    found = []
    for scale in (1.0, 5.0):  # of the decoder's half
        with torch.no_grad():
            prompts[4:] *= scale
        found.append((seq2seq(wrapped), wrapped.generate(**inputs, **settings).logits[0]))
    assert not torch.allclose(found[0][0][:, -5:], found[1][0][:, -5:], atol=1e-3)
    assert torch.equal(found[0][1], found[1][1])
    with pytest.raises(FormatError, match=r"num_transformer_submodules is 2.*leaves out of gen"):
        gt.load(base("t5", "default"), tmp_path / "a")


def test_what_peft_lacks_is_said_and_written_in_our_form(tmp_path: Path) -> None:
    method = gt.MultitaskPromptTuning(length=4, tasks=1, position="after-first")
    adapter = check_own_form("llama", method, tmp_path / "a")
    assert "this one follows the first token" in obstacle(adapter)


def test_tasks_of_another_number_are_refused(tmp_path: Path) -> None:
    written("llama", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_tasks": 2}))
    with pytest.raises(Exception, match=r"\(3, 4, 2\), this model needs \(2, 4, 2\)"):
        gt.load(base("llama", "default"), tmp_path / "a")
