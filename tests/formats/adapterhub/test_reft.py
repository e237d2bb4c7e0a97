"""Interventions read from AdapterHub's files and written: what R is, and which tokens' it is."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.adapterhub.reft import BASE, ORIGINAL, orthogonal
from graftune.formats.adapterhub.writing import save
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import BLOCKS, LORA, WIDTH, write
from tests.formats.adapterhub.test_low_rank import lora_tensors

R = 2
REFT: dict[str, Any] = {
    "architecture": "reft",
    "dropout": 0.0,
    "dtype": None,
    "init_weights_seed": None,
    "layers": "all",
    "non_linearity": None,
    "orthogonality": True,
    "output_reft": True,
    "prefix_positions": 2,
    "r": R,
    "suffix_positions": 1,
    "tied_weights": False,
}
NOREFT = REFT | {"orthogonality": False}
HOMES = {
    "bert": ["bert.encoder.layer"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "vit": ["vit.encoder.layer"],
}


def trained(width: int = WIDTH, r: int = R, seed: int = 0) -> tuple[nn.Linear, dict[str, Tensor]]:
    """Returns a projection with torch's parametrisation, off its start, and its tensors."""
    linear = nn.Linear(width, r, bias=False)
    made = nn.utils.parametrizations.orthogonal(linear)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        original: Any = made.parametrizations["weight"].original
        original += torch.randn(original.shape, generator=draw).triu(1)
    return made, {f"projection.{n}": t.contiguous() for n, t in made.state_dict().items()}


def units(config: Any, family: str = "bert") -> dict[str, Tensor]:
    """Returns random tensors of every block."""
    draw, found = torch.Generator().manual_seed(7), dict[str, Tensor]()
    blocks = [f"{home}.{at}" for home in HOMES[family] for at in range(BLOCKS)]
    for seed, block in enumerate(blocks):
        if config["layers"] != "all" and seed not in config["layers"]:
            continue
        for number in range(1 if config["tied_weights"] else 2):
            home = f"{block}.reft_layer.refts.task.units.{number}"
            R_ = {"projection.weight": torch.randn(R, WIDTH, generator=draw) * 0.3}
            if config["orthogonality"]:
                R_ = trained(seed=10 * seed + number)[1]
            own = {
                "learned_source.weight": torch.randn(R, WIDTH, generator=draw) * 0.3,
                "learned_source.bias": torch.randn(R, generator=draw),
                **R_,
            }
            found |= {f"{home}.{name}": tensor for name, tensor in own.items()}
    return found


def load(path: Path, family: str = "bert") -> gt.Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gt.load(FAMILIES[family].build(), path, name="a")


@pytest.mark.parametrize(("width", "r"), [(8, 3), (8, 1), (8, 8)])
def test_rows_are_those_that_torch_makes(width: int, r: int) -> None:
    linear, own = trained(width, r)
    theirs: Tensor = linear.weight.detach()
    torch.testing.assert_close(orthogonal(own[ORIGINAL], own[BASE], "it"), theirs)


def test_rows_that_are_not_orthonormal_are_refused() -> None:
    _, own = trained(8, 3)
    with pytest.raises(FormatError, match="it makes rows that aren't orthonormal"):
        orthogonal(own[ORIGINAL] * 0.9, own[BASE], "it")  # what weight decay does: signs become 0
    with pytest.raises(FormatError, match=r"is \(3, 8\) and its base \(3, 3\), expected"):
        orthogonal(own[ORIGINAL], own[BASE][:3, :3], "it")


@pytest.mark.parametrize("family", HOMES)
def test_each_unit_is_that_of_its_block_and_tokens(family: str, tmp_path: Path) -> None:
    given = units(REFT, family)
    adapter = load(write(tmp_path / "a", REFT, given, family), family)
    assert isinstance(adapter.method, gt.LoReFT)
    own = adapter.state_dict()
    assert len(own) == 3 * 2 * BLOCKS * len(HOMES[family])
    places = iter([graft.place.key for graft in adapter.grafts])
    for home in HOMES[family]:
        for at in range(BLOCKS):
            place = next(places)
            for number, name in enumerate(("first", "last")):
                theirs = f"{home}.{at}.reft_layer.refts.task.units.{number}"
                assert torch.equal(
                    own[f"{place}.{name}.W"], given[f"{theirs}.learned_source.weight"]
                )
                assert torch.equal(own[f"{place}.{name}.b"], given[f"{theirs}.learned_source.bias"])
                basis = orthogonal(given[f"{theirs}.{ORIGINAL}"], given[f"{theirs}.{BASE}"], "it")
                torch.testing.assert_close(own[f"{place}.{name}.basis"], basis)


def test_a_block_answers_as_adapterhubs_would(tmp_path: Path) -> None:
    config = NOREFT | {"subtract_projection": True, "non_linearity": "relu", "layers": [1]}
    given = units(config)
    model = load(write(tmp_path / "a", config, given, "bert")).model
    seen: list[Tensor] = []
    block: Any = model.get_submodule("bert.encoder.layer.1")
    block.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    for name in (None, "a"):
        with gt.using(model, name):
            logits(model, FAMILIES["bert"].inputs(padding="right"))
    h, found = seen
    expected = h.clone()
    for row, length in enumerate((5, 7)):
        for number, token in ((0, 0), (0, 1), (1, length - 1)):
            home = f"bert.encoder.layer.1.reft_layer.refts.task.units.{number}"
            W, b = given[f"{home}.learned_source.weight"], given[f"{home}.learned_source.bias"]
            P, x = given[f"{home}.projection.weight"], h[row, token]
            expected[row, token] = x + (torch.relu(W @ x + b) - P @ x) @ P
    torch.testing.assert_close(found, expected)


def test_what_is_left_of_a_direft_is_a_noreft_unless_it_is_told(tmp_path: Path) -> None:
    given = units(NOREFT)
    with pytest.warns(UserWarning, match='"subtract_projection": false'):
        found = gt.load(FAMILIES["bert"].build(), write(tmp_path / "a", NOREFT, given, "bert"))
    assert isinstance(found.method, gt.NoReFT)
    for orthogonality in (False, True):
        config = REFT | {"orthogonality": orthogonality, "subtract_projection": False}
        told = load(write(tmp_path / f"{orthogonality}", config, units(config), "bert"))
        assert isinstance(told.method, gt.DiReFT)
        assert told.method.is_orthonormal == orthogonality


def test_units_of_no_tokens_are_left_out_and_layers_are_chosen(tmp_path: Path) -> None:
    config = REFT | {"suffix_positions": 0, "layers": [1, 2]}
    adapter = load(write(tmp_path / "a", config, units(config, "t5"), "t5"), "t5")
    assert adapter.method.layers == (1, 2)  # type: ignore[attr-defined]
    places = ("encoder.block.1", "decoder.block.0")
    assert set(adapter.state_dict()) == {
        f"{place}.adapter.first.{name}" for place in places for name in ("basis", "W", "b")
    }


@pytest.mark.parametrize(
    ("config", "change", "kind", "told"),
    [
        ({"r": None}, {}, FormatError, 'settings have no "r"'),
        ({"output_reft": False}, {}, FormatError, "output_reft=False, with which it changes"),
        ({"r": 3}, {}, BaseMismatchError, r"is \(2, 32\), this model needs \(3, 32\)"),
        ({"tied_weights": True}, {}, FormatError, "unexpected"),
        ({"orthogonality": False, "subtract_projection": True}, {}, FormatError, "missing"),
        ({"layers": [0]}, {}, FormatError, "unexpected: .*layer.1.reft"),
        ({"non_linearity": "sine"}, {}, FormatError, 'activation "sine" is unknown'),
        ({"shift": 1}, {}, FormatError, 'setting "shift"'),
        ({}, {"units.2.learned_source.bias": torch.ones(2)}, FormatError, "tensors are missing"),
        ({}, {"2": torch.ones(2)}, BaseMismatchError, "blocks that it doesn't have"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: Any, change: Any, kind: Any, told: str, tmp_path: Path
) -> None:
    home, model = "bert.encoder.layer.0.reft_layer.refts.task", FAMILIES["bert"].build()
    deep = "bert.encoder.layer.2.reft_layer.refts.task.units.0.learned_source.bias"
    more = {deep if n == "2" else f"{home}.{n}": tensor for n, tensor in change.items()}
    path = write(tmp_path / "a", REFT | config, units(REFT) | more, "bert")
    with pytest.raises(kind, match=told) as error:
        gt.load(model, path)
    assert gt.adapters(model) == {}
    assert "\n" not in str(error.value)


def test_a_deeper_model_is_told_from_a_broken_file(tmp_path: Path) -> None:
    given = {name: t for name, t in units(REFT).items() if ".layer.0." in name}
    with pytest.raises(BaseMismatchError, match="nothing for block 1"):
        gt.load(FAMILIES["bert"].build(), write(tmp_path / "a", REFT, given, "bert"))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("bert", gt.LoReFT(suffix_positions=2)),
        ("gpt2", gt.LoReFT(prefix_positions=0, suffix_positions=2, activation="gelu_tanh")),
        ("t5", gt.LoReFT(layers=[0, 2])),
        ("llama", gt.LoReFT(r=WIDTH, tied=True)),
        ("llama", gt.NoReFT(activation="silu")),
        ("vit", gt.NoReFT(suffix_positions=1, tied=True)),
        ("bert", gt.DiReFT(suffix_positions=1)),
        ("gpt2", gt.DiReFT(orthogonal=True)),
    ],
    ids=lambda part: getattr(part, "name", part),
)
def test_ours_come_back_as_the_same_function(family: str, method: Any, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, name="a", seed=0)
    shake(adapter, 1, noise=0.2)
    path = save(adapter, tmp_path / "a")
    again = FAMILIES[family].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if method.is_orthonormal else "ignore")
        gt.load(again, path, name="a")
    inputs = FAMILIES[family].inputs()
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)
    config = json.loads((path / "adapter_config.json").read_text())["config"]
    assert config.keys() == REFT.keys()
    assert config["layers"] == ([0, 2] if method.layers else "all")


@pytest.mark.parametrize("r", [1, 4, WIDTH])
def test_what_is_written_is_what_torch_makes_the_same_rows_of(r: int, tmp_path: Path) -> None:
    adapter = gt.attach(FAMILIES["bert"].build(), gt.LoReFT(r=r), name="a", seed=0)
    shake(adapter, 1, noise=0.2)
    saved = load_file(save(adapter, tmp_path / "a") / "adapter.safetensors")
    home = "bert.encoder.layer.0.reft_layer.refts.a.units"
    linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, r, bias=False))
    own = {n: saved[f"{home}.0.projection.{n}"] for n in linear.state_dict()}
    linear.load_state_dict(own)
    unit: Any = adapter.grafts[0].delta.get_submodule("first")
    torch.testing.assert_close(linear.weight, unit.R(), atol=1e-6, rtol=1e-5)
    for name in (ORIGINAL, BASE, "learned_source.weight", "learned_source.bias"):
        assert torch.equal(saved[f"{home}.1.{name}"], saved[f"{home}.0.{name}"])


@pytest.mark.parametrize(
    ("family", "method", "told"),
    [
        ("bert", gt.DiReFT(activation="relu"), r"DiReFT as a NoReFT.*without an activation alone"),
        ("bert", gt.LoReFT(activation="elu"), "no activation elu"),
        ("opt", gt.LoReFT(), "models of type opt"),
    ],
)
def test_what_adapterhub_cannot_compute_is_not_written(
    family: str, method: Any, told: str, tmp_path: Path
) -> None:
    adapter = gt.attach(FAMILIES[family].build(), method, name="a")
    with pytest.raises(FormatError, match=told):
        save(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_it_can_be_a_part_of_a_union(tmp_path: Path) -> None:
    config = {"architecture": "union", "configs": [REFT, LORA]}
    given = units(REFT) | lora_tensors("bert", LORA)
    found = load(write(tmp_path / "a", config, given, "bert"))
    assert isinstance(found.method, gt.Union)
    assert [part.name for part in found.method.parts] == ["LoReFT", "LoRA"]
    again = load(save(found, tmp_path / "again"))
    inputs = FAMILIES["bert"].inputs()
    torch.testing.assert_close(logits(again.model, inputs), logits(found.model, inputs))
