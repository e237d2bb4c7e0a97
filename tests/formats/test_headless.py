"""Loading without the head: the body's change alone, on a model with a head of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graftune as gt
from graftune.errors import FormatError
from tests.contract.subjects import METHODS, shake
from tests.families import FAMILIES
from tests.parity.exchange import peft, saved_by_peft

LABELS = 5
"""Of the model that is loaded onto; those that adapters were trained on have fewer."""


OURS = ("lora", "bitfit", "ia3", "vera", "norms", "diffpruning", "houlsby", "pfeiffer", "said")


def other(family: str = "bert") -> Any:
    """Returns the same body under another head."""
    model = FAMILIES[family].build("classification", num_labels=LABELS)
    body = FAMILIES[family].build("classification").base_model.state_dict()
    model.base_model.load_state_dict(body)
    return model


def features(model: Any, family: str = "bert") -> Tensor:
    """Returns what enters the head."""
    with torch.no_grad():
        found = model.eval()(**FAMILIES[family].inputs(), output_hidden_states=True)
    return found.hidden_states[-1]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", OURS)
def test_the_body_of_ours_changes_alone(method: str, family: str, tmp_path: Path) -> None:
    trained = FAMILIES[family].build("classification")
    adapter = gt.attach(trained, METHODS[method], seed=0)
    shake(adapter, seed=1)
    assert adapter.head_names
    adapter.save(tmp_path / "a")
    model = other(family)
    loaded = gt.load(model, tmp_path / "a", head=False)
    assert loaded.head_names == ()
    assert loaded.method.train_head is False
    torch.testing.assert_close(features(model, family), features(trained, family))
    assert not [n for n, _ in loaded.named_tensors() if n.startswith(("classifier", "score"))]


def test_it_is_saved_again_without_one(tmp_path: Path) -> None:
    trained = FAMILIES["bert"].build("classification")
    shake(gt.attach(trained, gt.PfeifferAdapter(bottleneck=4), "task", seed=0), seed=1)
    gt.adapters(trained)["task"].save(tmp_path / "a")
    model = other()
    gt.load(model, tmp_path / "a", "bare", head=False).save(tmp_path / "b")
    again = other()
    gt.load(again, tmp_path / "b")
    assert torch.equal(features(again), features(model))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoraConfig", {"r": 4, "task_type": "SEQ_CLS"}),
        ("LoraConfig", {"r": 4, "modules_to_save": ["classifier"]}),
        ("LoraConfig", {"r": 4, "modules_to_save": ["classifier", "LayerNorm"]}),
        ("IA3Config", {"task_type": "SEQ_CLS", "feedforward_modules": ["output.dense"]}),
        ("VeraConfig", {"r": 4, "task_type": "SEQ_CLS"}),
    ],
)
def test_the_body_of_pefts_changes_alone(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    targets = ["query", "value"] + ["output.dense"] * ("IA3" in kind)
    config = getattr(peft, kind)(target_modules=targets, **settings)
    saved_by_peft("bert", "classification", config, tmp_path)
    whole, model = FAMILIES["bert"].build("classification"), other()
    gt.load(whole, tmp_path, "a")
    loaded = gt.load(model, tmp_path, "a", head=False)
    torch.testing.assert_close(features(model), features(whole))
    assert not [name for name, _ in loaded.named_tensors() if name.startswith("classifier")]
    assert (features(model) != features(other())).any()


def test_it_fits_a_model_without_any_head(tmp_path: Path) -> None:
    trained = FAMILIES["bert"].build("classification")
    shake(gt.attach(trained, gt.LoRA(r=2), "task", seed=0), seed=1)
    gt.adapters(trained)["task"].save(tmp_path / "a")
    plain = FAMILIES["bert"].build("classification")
    masked = transformers.BertForMaskedLM(plain.config).eval()
    masked.bert.load_state_dict(plain.bert.state_dict(), strict=False)
    gt.load(masked, tmp_path / "a", head=False)
    assert torch.equal(features(masked), features(trained))


@pytest.mark.parametrize("keep_base", [False, True])
def test_a_whole_model_has_no_body_to_load(keep_base: bool, tmp_path: Path) -> None:
    trained = FAMILIES["bert"].build("classification")
    gt.attach(trained, gt.FullFineTuning(keep_base=keep_base)).save(tmp_path / "a")
    model = FAMILIES["bert"].build("classification")
    with pytest.raises(FormatError, match="a whole model: head=False can't leave"):
        gt.load(model, tmp_path / "a", head=False)
    assert not gt.adapters(model)
