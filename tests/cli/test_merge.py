import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from graftune.cli import merge as merging
from graftune.errors import TrainingError


def test_the_merged_checkpoint_is_plain_and_gives_the_runs_predictions(graftune, trained, tmp_path):
    out, _ = trained
    into = tmp_path / "merged"
    found = graftune("merge", out, "--into", into, "--json")
    assert found.code == 0, found.err
    assert found.json["max_logit_difference"] < 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(into)
    assert not [name for name in model.state_dict() if "lora" in name or "delta" in name]
    text = "where is my parcel"
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(into)(text, return_tensors="pt")).logits
    label = model.config.id2label[int(logits.argmax())]
    known = graftune("predict", out, text, "--json").json[0]
    assert label == known["label"]
    assert float(logits.softmax(-1).max()) == pytest.approx(known["score"], abs=1e-5)


def test_a_difference_above_the_tolerance_is_refused_and_leaves_nothing(
    graftune, trained, tmp_path, monkeypatch
):
    out, _ = trained
    monkeypatch.setattr(merging, "_save_checked", lambda *_: merging.Difference(0.5, 0.1))
    ended = graftune("merge", out, "--into", tmp_path / "merged", "--tolerance", "0.1")
    assert ended.code == 1
    assert "differ by up to 0.5" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(TrainingError, match="differ by up to nan"):
        merging._refuse_above(merging.Difference(float("nan"), 0.0), 1.0)


def test_a_folder_in_use_is_refused(graftune, trained, tmp_path):
    out, _ = trained
    (tmp_path / "file").write_text("mine")
    ended = graftune("merge", out, "--into", tmp_path)
    assert ended.code == 2
    assert "not empty" in ended.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_no_adapter_is_refused(graftune, tmp_path):
    ended = graftune("merge", tmp_path, "--into", tmp_path / "merged")
    assert ended.code == 2
    assert "adapter_config.json" in ended.err
