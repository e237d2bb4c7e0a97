import json

import pytest
import torch
from safetensors.torch import load_file

import graftune as gt
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import (
    BOTTLENECK,
    LORA,
    bottlenecks,
    write,
    write_head,
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A bottleneck adapter as AdapterHub writes it, with a head of four classes."""
    path = tmp_path_factory.mktemp("theirs") / "task"
    write(path, BOTTLENECK, bottlenecks("bert", BOTTLENECK), "bert", model_class="BertAdapterModel")
    draw = torch.Generator().manual_seed(0)
    shapes = {"1.weight": (32, 32), "1.bias": (32,), "4.weight": (4, 32), "4.bias": (4,)}
    head = {f"heads.task.{k}": torch.randn(s, generator=draw) for k, s in shapes.items()}
    config = {"head_type": "classification", "activation_function": "tanh", "num_labels": 4}
    write_head(path, config, head)
    return path


def test_adapterhubs_becomes_ours_and_goes_back(graftune, base, theirs, tmp_path):
    ended = graftune("convert", theirs, "--base", base, "--into", tmp_path / "own", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["method"] == "PfeifferAdapter"
    assert gt.inspect(tmp_path / "own").heads == ("bert.pooler.dense", "classifier")
    plain = tmp_path / "plain"
    ended = graftune("convert", theirs, "--base", base, "--no-head", "--into", plain)
    assert ended.code == 0, ended.err
    assert "written to" in ended.out
    back = tmp_path / "back"
    ended = graftune("convert", plain, "--to", "adapterhub", "--base", base, "--into", back)
    assert ended.code == 0, ended.err
    found = {entry.name.replace(".plain.", ".task.") for entry in gt.inspect(back).tensors}
    named = {name.removeprefix("bert.") for name in bottlenecks("bert", BOTTLENECK)}
    assert found == named  # of the base alone, without a head


def test_a_run_becomes_pefts(graftune, trained, tmp_path):
    peft = pytest.importorskip("peft")
    out, _ = trained
    ended = graftune("convert", out, "--to", "peft", "--into", tmp_path / "a", "--json")
    assert ended.code == 0, ended.err
    assert peft.PeftConfig.from_pretrained(tmp_path / "a").peft_type == "LORA"


PROMPTS = {
    "PROMPT_TUNING": ("PromptTuningConfig", "PromptTuning"),
    "P_TUNING": ("PromptEncoderConfig", "PTuning"),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_prompts_go_from_peft_to_ours_and_back(graftune, tmp_path, kind):
    peft = pytest.importorskip("peft")
    name, method = PROMPTS[kind]
    model = FAMILIES["llama"].build(task="classification")
    model.save_pretrained(tmp_path / "base")
    config = getattr(peft, name)(num_virtual_tokens=4, task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    own, back = tmp_path / "own", tmp_path / "back"
    base = ("--base", tmp_path / "base")
    ended = graftune("convert", tmp_path / "theirs", *base, "--into", own, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["method"] == method
    ended = graftune("convert", own, "--to", "peft", *base, "--into", back, "--json")
    assert ended.code == 0, ended.err
    given, found = (
        load_file(at / "adapter_model.safetensors") for at in (tmp_path / "theirs", back)
    )
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)
    assert peft.PeftConfig.from_pretrained(back).peft_type == kind
    ended = graftune("convert", own, "--to", "adapterhub", *base, "--into", tmp_path / "hub")
    assert ended.code != 0
    assert method in ended.err


def test_a_lora_goes_from_adapterhub_to_peft(graftune, base, tmp_path):
    draw = torch.Generator().manual_seed(1)
    tensors = {
        f"bert.encoder.layer.{index}.attention.self.{name}.loras.task.{factor}": torch.randn(
            shape, generator=draw
        )
        for index in range(2)
        for name in ("query", "value")
        for factor, shape in {"lora_A": (3, 32), "lora_B": (32, 3)}.items()
    }
    path = write(tmp_path / "a", LORA, tensors, "bert", model_class="BertModel")
    into = tmp_path / "b"
    ended = graftune("convert", path, "--to", "peft", "--base", base, "--into", into)
    assert ended.code == 0, ended.err
    config = json.loads((into / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert sorted(config["target_modules"]) == ["query", "value"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "pefft"], 'Did you mean "peft"?'),
        (["--to", "peft", "--no-head"], "HF PEFT has no PfeifferAdapter"),
        (["--base", "nowhere/there"], "nowhere/there"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    graftune, base, theirs, tmp_path, options, told
):
    rest = [] if "--base" in options else ["--base", base]
    ended = graftune("convert", theirs, "--into", tmp_path / "x", *options, *rest)
    assert ended.code == 2
    assert told in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_kept(graftune, base, theirs, tmp_path):
    (tmp_path / "mine").write_text("x")
    ended = graftune("convert", theirs, "--base", base, "--into", tmp_path)
    assert ended.code == 2
    assert "not empty" in ended.err
    assert (tmp_path / "mine").read_text() == "x"


def test_a_folder_that_is_no_adapter_is_refused(graftune, tmp_path):
    ended = graftune("convert", tmp_path, "--into", tmp_path / "x")
    assert ended.code == 2
    assert "adapter_config.json" in ended.err


def test_a_base_that_nobody_names_is_asked_for(graftune, tmp_path):
    path = write(tmp_path / "a", BOTTLENECK, bottlenecks("bert", BOTTLENECK), "bert", model_name="")
    ended = graftune("convert", path, "--into", tmp_path / "x")
    assert ended.code == 2
    assert "say which with --base" in ended.err
