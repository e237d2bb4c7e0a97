"""Every wrong directory is refused with one sentence, and nothing is left half attached."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, BaseMismatchError, FormatError
from graftune.formats import hub
from graftune.formats.loading import default_name
from tests.families import FAMILIES

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory of ours."""
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.LoRA(r=4, targets="attention"), seed=0)
    return adapter.save(tmp_path_factory.mktemp("ours") / "a")


@pytest.fixture
def ours(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))


@pytest.fixture
def theirs(ours: Path) -> Path:
    """Returns the same directory as HF PEFT would write it: without our own file."""
    (ours / "graftune.json").unlink()
    return ours


def refused(path: Path, told: str, kind: type[Exception] = FormatError, **options: Any) -> str:
    """Loads, expects the error, and checks that the model is as it was."""
    model = FAMILIES["llama"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=told) as error:
        gt.load(model, path, **options)
    assert gt.adapters(model) == {}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    message = str(error.value)
    assert "\n" not in message
    return message


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def change_json(path: Path, name: str, **settings: Any) -> None:
    content = json.loads((path / name).read_text()) | settings
    (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_cut_file_is_refused(ours: Path, kept: int) -> None:
    file = ours / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(ours, "isn't a whole safetensors file")


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_missing_tensors_are_listed(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    change_tensors(path, lambda t: [t.pop(name) for name in sorted(t)[:7]])
    refused(
        path, r'7 missing: "model\.layers\.0\.self_attn\.k_proj\.lora_A\.weight", .* and 2 more'
    )


def test_unexpected_tensors_are_listed(ours: Path) -> None:
    change_tensors(ours, lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(1)}))
    refused(ours, r"q_proj\.lora_C")


def test_tensors_of_modules_not_targeted_are_listed(theirs: Path) -> None:
    change_json(theirs, "adapter_config.json", target_modules=["q_proj", "v_proj", "o_proj"])
    refused(theirs, r'4 unexpected: "model\.layers\.0\.self_attn\.k_proj\.lora_A\.weight"')


def test_values_that_are_not_finite_are_listed(ours: Path) -> None:
    change_tensors(ours, lambda t: [t[f"{Q}.lora_{x}.weight"].fill_(float("nan")) for x in "AB"])
    refused(ours, r"2 of 16 tensors hold values that aren't finite: .*q_proj\.lora_A")


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_another_base_is_named(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    change_json(path, "adapter_config.json", base_model_name_or_path="org/other")
    for config in ({"hidden_size": 64}, {"num_hidden_layers": 1}):
        model = FAMILIES["llama"].build(**config)
        with pytest.raises(BaseMismatchError, match="LlamaForCausalLM") as error:
            gt.load(model, path)
        assert gt.adapters(model) == {}
        assert which == "ours" or '"org/other"' in str(error.value)


def test_a_base_of_other_weights_is_told_and_may_be_allowed(ours: Path) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(BaseMismatchError, match=r"other weights .* check_base=False"):
        gt.load(model, ours)
    gt.load(model, ours, check_base=False)


def test_a_base_in_half_precision_is_the_same_base(ours: Path) -> None:
    gt.load(FAMILIES["llama"].build(dtype=torch.bfloat16), ours)


def test_another_model_type_is_told(theirs: Path) -> None:
    with pytest.raises(BaseMismatchError, match=r"this Bert.* is not: .* doesn't have"):
        gt.load(FAMILIES["bert"].build(), theirs)


def test_a_rank_that_is_not_the_files_is_told(theirs: Path) -> None:
    change_json(theirs, "adapter_config.json", r=8)
    refused(theirs, r"lora_A\.weight\" is \(4, 32\), this model needs \(8, 32\)")


def test_an_unknown_setting_names_key_value_and_version(theirs: Path) -> None:
    change_json(theirs, "adapter_config.json", use_xyz=True, peft_version="9.1")
    refused(theirs, r'"use_xyz" \(True\), written by PEFT 9\.1, is unknown')


def test_an_unknown_setting_of_ours_names_the_version(ours: Path) -> None:
    own = json.loads((ours / "graftune.json").read_text())
    change_json(ours, "graftune.json", method=own["method"] | {"droput": 2}, graftune_version="7.0")
    refused(ours, r"written by graftune 7.0: .*" r'no setting "droput".*Did you mean "dropout"')


def test_a_newer_format_says_to_update(ours: Path) -> None:
    change_json(ours, "graftune.json", format_version=99, graftune_version="7.0")
    refused(ours, "has format 99, written by graftune 7.0.*update")


def test_an_unknown_method_is_told(ours: Path) -> None:
    change_json(ours, "adapter_config.json", peft_type="WARP")
    change_json(ours, "graftune.json", method={"method": "Warp"})
    refused(ours, 'No method is named "Warp"')


def test_a_method_of_peft_that_is_not_read_is_told(theirs: Path) -> None:
    change_json(theirs, "adapter_config.json", peft_type="OFT")
    refused(theirs, "of type OFT, written by HF PEFT")


@pytest.fixture
def pickled(theirs: Path) -> Path:
    file = theirs / "adapter_model.safetensors"
    torch.save(safetensors.torch.load_file(file), theirs / "adapter_model.bin")
    file.unlink()
    return theirs


def test_a_pickle_is_refused_unless_allowed(pickled: Path) -> None:
    refused(pickled, r"pickle, adapter_model\.bin, .* allow_pickle=True")
    model = FAMILIES["llama"].build()
    assert gt.load(model, pickled, allow_pickle=True).count() > 0


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/graftune-must-not-exist"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused_even_if_allowed(pickled: Path) -> None:
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    refused(pickled, "can't be read as tensors alone", allow_pickle=True)
    assert not Path("/tmp/graftune-must-not-exist").exists()


def test_a_pickle_of_something_else_is_refused(pickled: Path) -> None:
    torch.save([1, 2], pickled / "adapter_model.bin")
    refused(pickled, "holds a list, not tensors by name", allow_pickle=True)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", 'has no "nothing"')


def test_a_missing_config_says_what_lies_there(ours: Path) -> None:
    (ours / "adapter_config.json").rename(ours / "settings.json")
    refused(ours, "has no adapter_config.json: it holds README.md")


def test_a_folder_of_adapters_is_pointed_into(ours: Path) -> None:
    refused(ours.parent, 'adapters lie in its folders: try ".*/a"')


def test_a_whole_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds a whole model, not an adapter")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "isn't JSON"),
        ("[]", "holds a list, not an object"),
        ('{"model_type": "bert"}', "config of a whole model"),
        ('{"config": {}, "hidden_size": 4}', "AdapterHub"),
        ('{"a": 1}', "isn't an adapter's config \\(it has \"a\"\\)"),
    ],
)
def test_a_foreign_config_is_told(ours: Path, content: str, told: str) -> None:
    (ours / "adapter_config.json").write_text(content)
    refused(ours, told)


def test_missing_weights_are_told(ours: Path) -> None:
    (ours / "adapter_model.safetensors").unlink()
    refused(ours, "has no adapter_model.safetensors")


def test_a_name_that_is_taken_or_wrong_is_told(ours: Path) -> None:
    model = FAMILIES["llama"].build()
    gt.load(model, ours, name="x")
    with pytest.raises(AdapterError, match="attached already"):
        gt.load(model, ours, name="x")
    with pytest.raises(AdapterError, match="without"):
        gt.load(model, ours, name="a/b")
    assert list(gt.adapters(model)) == ["x"]


def test_the_name_is_the_folders(tmp_path: Path) -> None:
    assert default_name("out/intents") == "intents"
    assert default_name(tmp_path / "v1.2") == "v1-2"
    assert default_name("owner/name") == "name"


def test_a_hub_name_without_a_network_is_told() -> None:
    refused(Path("nobody/nothing"), "the hub can't be reached|no such adapter")


def test_a_local_folder_is_taken_before_the_hub(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ours.parent.parent)
    assert hub.located(f"{ours.parent.name}/a") == Path(f"{ours.parent.name}/a")


def test_many_adapters_side_by_side_keep_their_own_values(ours: Path) -> None:
    model = FAMILIES["llama"].build()
    first = gt.load(model, ours, name="one")
    second = gt.load(model, ours, name="two")
    with torch.no_grad():
        for tensor in second.parameters():
            tensor.zero_()
    assert all(bool(t.any()) for n, t in first.state_dict().items() if n.endswith(".A"))


def test_a_loaded_adapter_does_not_depend_on_the_file(ours: Path) -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.load(model, ours)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    file = ours / "adapter_model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, before[name])
