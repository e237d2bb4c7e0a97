"""Every wrong AdapterHub directory is refused with one sentence, and nothing is half attached."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import BOTTLENECK, bottlenecks, write

UP = "bert.encoder.layer.1.output.adapters.task.adapter_up.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a", BOTTLENECK, bottlenecks("bert", BOTTLENECK), "bert")


def refused(
    path: Path, told: str, kind: type[Exception] = FormatError, model: Any = None, **options: Any
) -> None:
    """Loads, expects the error, and checks that nothing is attached or frozen."""
    model = model or FAMILIES["bert"].build()
    with pytest.raises(kind, match=told) as error:
        gt.load(model, path, **options)
    assert gt.adapters(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "\n" not in str(error.value)


def pickled(path: Path) -> Path:
    """Puts the weights into a pickle, as the library does unless asked."""
    file = path / "adapter.safetensors"
    torch.save(safetensors.torch.load_file(file), path / "pytorch_adapter.bin")
    file.unlink()
    return path


def test_a_pickle_is_opened_only_if_asked(path: Path) -> None:
    expected = gt.load(FAMILIES["bert"].build(), path).state_dict()
    refused(pickled(path), "pytorch_adapter.bin, which can hold code: pass allow_pickle=True")
    with pytest.raises(FormatError, match="as a pickle"):
        gt.inspect(path)
    found = gt.load(FAMILIES["bert"].build(), path, allow_pickle=True).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_pickle_never_runs_code(path: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    pickled(path)
    (path / "pytorch_adapter.bin").write_bytes(pickle.dumps({"x": Trap()}, protocol=2))
    refused(path, "can't be read as tensors alone", allow_pickle=True)
    assert not (tmp_path / "sprung").exists()


def test_copies_in_a_pool_are_passed_over(tmp_path: Path) -> None:
    tensors = bottlenecks("bert", BOTTLENECK)
    copied = tensors | {UP.replace("bert.", "bert.pool."): torch.zeros(3)}
    gt.load(FAMILIES["bert"].build(), write(tmp_path / "a", BOTTLENECK, copied, "bert"))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: FAMILIES["gpt2"].build(), "of type bert; this GPT2LMHeadModel is of type gpt2"),
        (lambda: FAMILIES["bert"].build(hidden_size=16), r"\(8, 32\), this model needs \(4, 16\)"),
        (lambda: FAMILIES["bert"].build(num_hidden_layers=3), "nothing for block 2 of 3"),
        (lambda: FAMILIES["bert"].build(num_hidden_layers=1), "4 tensors belong to blocks that it"),
    ],
    ids=["type", "width", "deeper", "shallower"],
)
def test_another_base_is_refused(path: Path, made: Any, told: str) -> None:
    refused(path, told, BaseMismatchError, made())


def test_another_type_can_be_asked_for(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text()) | {"model_type": "camembert"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    refused(path, "of type camembert", BaseMismatchError)
    gt.load(FAMILIES["bert"].build(), path, check_base=False)


def test_missing_unexpected_and_infinite_tensors(tmp_path: Path) -> None:
    tensors = bottlenecks("bert", BOTTLENECK)
    short = {name: tensor for name, tensor in tensors.items() if name != UP}
    refused(write(tmp_path / "a", BOTTLENECK, short, "bert"), "1 tensors are missing: .*adapter_up")
    every = {n: t for n, t in tensors.items() if "adapter_up.bias" not in n}
    refused(write(tmp_path / "b", BOTTLENECK, every, "bert"), "2 missing: .*ffn.adapter.up_bias")
    more = tensors | {"bert.what": torch.zeros(1)}
    refused(write(tmp_path / "c", BOTTLENECK, more, "bert"), '1 unexpected: "bert.what"')
    bad = tensors | {UP: torch.full_like(tensors[UP], float("nan"))}
    refused(
        write(tmp_path / "d", BOTTLENECK, bad, "bert"), "1 of 8 tensors hold values that aren't"
    )
    others = write(tmp_path / "e", BOTTLENECK, tensors, "bert", name="other")
    refused(others, "nothing for block 0 and 1 more of 2", BaseMismatchError)


def test_broken_files(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    refused(path, "isn't a whole safetensors file")
    file.unlink()
    refused(path, "neither adapter.safetensors nor pytorch_adapter.bin")


def test_inspect_tells_what_there_is(path: Path) -> None:
    found = gt.inspect(path, check_values=True)
    assert (found.method, found.wrote) == ("bottleneck", "AdapterHub adapters 1.3.0")
    assert (found.base, found.base_class) == ("some/base", "SomeModel")
    assert found.targets == {"output": 2}
    assert found.parameters == 2 * (2 * 32 * 8 + 32 + 8)
    assert found.nonfinite == {}
    assert not any(verdict.loads for verdict in found.verdicts)


def setup(path: Path, given: dict[str, Any]) -> Path:
    """Writes a setup of adapters "a" and "b" below a folder."""
    for seed, name in enumerate("ab"):
        tensors = bottlenecks("bert", BOTTLENECK, name)
        shifted = {key: tensor + 0.1 * seed for key, tensor in tensors.items()}
        write(path / name, BOTTLENECK, shifted, "bert", name=name)
    content = {"adapter_setup": given, "head_setup": None, "version": "adapters.1.3.0"}
    (path / "adapter_setup.json").write_text(json.dumps(content))
    return path


def one(name: str) -> dict[str, Any]:
    return {"type": "single", "children": [name]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "Stack", "children": [one("a"), one("b")]}, gt.Stack("a", "b")),
        ({"type": "Parallel", "children": [one("a"), one("b")]}, gt.Parallel("a", "b")),
        (
            {
                "type": "BatchSplit",
                "children": [one("a"), one("b")],
                "kwargs": {"batch_sizes": [1, 2]},
            },
            gt.Rows(["a", "b", "b"]),
        ),
        (
            {"type": "Average", "children": [one("a"), one("b")], "kwargs": {"weights": [1, 3]}},
            gt.Average("a", "b", weights=(0.25, 0.75)),
        ),
    ],
    ids=["stack", "parallel", "rows", "average"],
)
def test_a_setup_is_its_adapters_and_its_composition(
    given: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    model = FAMILIES["bert"].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = gt.load(model, setup(tmp_path / "s", given))
    assert list(gt.adapters(model)) == ["a", "b"]
    assert adapter.name == "b"
    state: Any = model.__dict__["_graftune"]
    assert state.active.plan.composition == expected


def test_an_average_is_told(tmp_path: Path) -> None:
    given = {"type": "Average", "children": [one("a"), one("b")]}
    with pytest.warns(UserWarning, match="divides by the number of members once more"):
        gt.load(FAMILIES["bert"].build(), setup(tmp_path / "s", given))


def test_of_a_setup_all_or_nothing_is_loaded(tmp_path: Path) -> None:
    path = setup(tmp_path / "s", {"type": "Stack", "children": [one("a"), one("b")]})
    write(path / "b", BOTTLENECK | {"brand_new": 1}, bottlenecks("bert", BOTTLENECK), "bert")
    refused(path, '"brand_new"')
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.LoRA(r=2), name="mine")
    with pytest.raises(FormatError, match="brand_new"):
        gt.load(model, path)
    assert list(gt.adapters(model)) == ["mine"]
    state: Any = model.__dict__["_graftune"]
    assert state.active.plan.composition == "mine"


def test_setups_that_cannot_be(tmp_path: Path) -> None:
    given = {"type": "Split", "children": [one("a"), one("b")], "kwargs": {"splits": [1, 2]}}
    path = setup(tmp_path / "s", given)
    refused(path, 'composed by "Split", which there isn\'t here')
    setup(path, {"type": "Stack", "children": [one("a"), one("b")]})
    refused(path, "leave name out", name="x")
    with pytest.raises(FormatError, match="is a setup of several adapters: inspect one of a, b"):
        gt.inspect(path)


def test_a_fusion_joins_attached_adapters(tmp_path: Path) -> None:
    model, draw = FAMILIES["bert"].build(), torch.Generator().manual_seed(0)
    tensors = {
        f"bert.encoder.layer.{index}.output.adapter_fusion_layer.a,b.{name}": torch.randn(
            shape, generator=draw
        )
        for index in range(2)
        for name, shape in {
            "query.weight": (32, 32),
            "query.bias": (32,),
            "key.weight": (32, 32),
            "key.bias": (32,),
            "value.weight": (32, 32),
        }.items()
    }
    folder = tmp_path / "f"
    folder.mkdir()
    settings = {"query": True, "key": True, "value": True, "query_before_ln": True}
    config = {"config": settings, "name": "a,b", "model_type": "bert", "version": "adapters.1.3.0"}
    (folder / "adapter_fusion_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "model_adapter_fusion.safetensors")
    refused(folder, 'member "a" is not attached')
    for name in "ab":
        gt.attach(model, gt.PfeifferAdapter(), name=name)
    adapter = gt.load(model, folder, name="both")
    assert adapter.method == gt.AdapterFusion(
        members=("a", "b"), query_from="answer", train_head=False
    )
    given = tensors["bert.encoder.layer.1.output.adapter_fusion_layer.a,b.key.bias"]
    assert torch.equal(adapter.state_dict()["bert.encoder.layer.1.ffn.adapter.key_bias"], given)
