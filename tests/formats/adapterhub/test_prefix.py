"""Prefixes read from AdapterHub's files, and written: which numbers come before which attention."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.adapterhub.writing import save
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import WIDTH, write

P, INNER = 3, 6
PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": INNER,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": P,
    "shared_gating": True,
    "use_gating": False,
}
FLAT = PREFIX | {"flat": True}
HOMES = {"bert": "bert.", "llama": "model.", "t5": ""}


def tensors(
    family: str, location: str = "self_prefix", width: int = 4 * WIDTH
) -> dict[str, Tensor]:
    """Returns a random MLP that makes `width` numbers a token."""
    draw = torch.Generator().manual_seed(6)
    shapes = {
        "wte.weight": (P, WIDTH),
        "control_trans.0.weight": (INNER, WIDTH),
        "control_trans.0.bias": (INNER,),
        "control_trans.2.weight": (width, INNER),
        "control_trans.2.bias": (width,),
    }
    home = f"{HOMES[family]}prefix_tuning.prefix_tunings.task.{location}"
    return {f"{home}.{name}": torch.randn(s, generator=draw) * 0.3 for name, s in shapes.items()}


def load(path: Path, family: str) -> gt.Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gt.load(FAMILIES[family].build(), path, name="a")


def flat(family: str, *locations: str, width: int = 4 * WIDTH) -> dict[str, Tensor]:
    """Returns flat prefixes that count up, each location's from its own number of ten thousands."""
    home = f"{HOMES[family]}prefix_tuning.prefix_tunings.task"
    return {
        f"{home}.{location}.control_trans": torch.arange(P * width) + 10_000.0 * at
        for at, location in enumerate(locations)
    }


@pytest.mark.parametrize("phi", ["tanh", "relu"])
@pytest.mark.parametrize(("family", "kv"), [("bert", WIDTH), ("llama", WIDTH // 2)])
def test_an_mlp_makes_keys_then_values_layer_by_layer(
    family: str, kv: int, phi: str, tmp_path: Path
) -> None:
    given = tensors(family, width=4 * kv)
    E, W1, c1, W2, c2 = given.values()
    table = getattr(torch, phi)(E @ W1.t() + c1) @ W2.t() + c2
    pool = {f"layer.0.prefix_tuning.pool.{name}": t + 1 for name, t in given.items()}
    config = PREFIX | {"non_linearity": phi}
    found = load(write(tmp_path / "a", config, given | pool, family), family)
    assert isinstance(found.method, gt.PrefixTuning)
    assert (found.method.length, found.method.hidden) == (P, None)
    for at, (key, value) in enumerate(zip(*[iter(found.state_dict().values())] * 2, strict=True)):
        torch.testing.assert_close(key, table[:, 2 * at * kv : (2 * at + 1) * kv])
        torch.testing.assert_close(value, table[:, (2 * at + 1) * kv : (2 * at + 2) * kv])


def test_each_location_has_its_own(tmp_path: Path) -> None:
    given = flat("t5", "encoder_prefix", "self_prefix", "cross_prefix")
    found = load(write(tmp_path / "a", FLAT, given, "t5"), "t5").state_dict()
    starts = {
        "encoder.block.1.layer.0.SelfAttention": 0,
        "decoder.block.1.layer.0.SelfAttention": 10_000,
        "decoder.block.1.layer.1.EncDecAttention": 20_000,
    }
    for module, start in starts.items():
        assert found[f"{module}.prefix.key"][1, 0] == start + 4 * WIDTH + 2 * WIDTH
        assert found[f"{module}.prefix.value"][1, 0] == start + 4 * WIDTH + 3 * WIDTH
    assert len(found) == 12


def test_locations_and_layers_can_be_left_out(tmp_path: Path) -> None:
    config = FLAT | {"encoder_prefix": False, "cross_prefix": False, "leave_out": [2]}
    given = flat("t5", "self_prefix", width=2 * WIDTH)
    found = load(write(tmp_path / "a", config, given, "t5"), "t5").state_dict()
    place = "decoder.block.1.layer.0.SelfAttention.prefix"
    assert list(found) == [f"{place}.key", f"{place}.value"]
    assert found[f"{place}.value"][1, 0] == 3 * WIDTH


def test_t5s_keys_are_shifted_as_theirs(tmp_path: Path) -> None:
    given = flat("t5", "encoder_prefix", "self_prefix", "cross_prefix")
    found = load(write(tmp_path / "a", FLAT, given, "t5"), "t5")
    assert found.method.shift_keys  # type: ignore[attr-defined]
    again = gt.load(FAMILIES["t5"].build(), save(found, tmp_path / "b"), name="a")
    inputs = FAMILIES["t5"].inputs()
    assert torch.equal(logits(again.model, inputs), logits(found.model, inputs))


@pytest.mark.parametrize(
    ("config", "change", "kind", "told"),
    [
        ({"use_gating": True}, {}, FormatError, "4 missing: .*prefix.gate.bias"),
        ({"prefix_length": 4}, {}, BaseMismatchError, r"wte.weight\" is \(3, 32\).*\(4, 32\)"),
        ({"leave_out": [1]}, {}, BaseMismatchError, r"trans.2.weight\" is \(128, 6\).*\(64, 6\)"),
        ({"flat": True}, {}, FormatError, "1 missing for self_prefix: .*5 unexpected"),
        ({}, {"cross_prefix.control_trans": torch.ones(1)}, FormatError, "1 unexpected: .*cross"),
        ({}, {"other.wte.weight": torch.ones(1)}, FormatError, "1 unexpected: .*other"),
        ({"non_linearity": "sine"}, {}, FormatError, 'activation "sine" is unknown'),
    ],
)
def test_what_does_not_fit_is_refused(
    config: Any, change: Any, kind: Any, told: str, tmp_path: Path
) -> None:
    home, model = "bert.prefix_tuning.prefix_tunings.task", FAMILIES["bert"].build()
    given = tensors("bert") | {f"{home}.{name}": tensor for name, tensor in change.items()}
    with pytest.raises(kind, match=told) as error:
        gt.load(model, write(tmp_path / "a", PREFIX | config, given, "bert"))
    assert gt.adapters(model) == {}
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("bert", gt.PrefixTuning(length=3, hidden=8)),
        ("bert", gt.PTuningV2(length=3, layers=(1,))),
        ("gpt2", gt.PrefixTuning(length=3, hidden=None)),
        ("llama", gt.PrefixTuning(length=3, hidden=8)),
        ("vit", gt.PrefixTuning(length=3, hidden=None, sublayers=("attention",))),
    ],
    ids=lambda part: getattr(part, "name", part),
)
def test_ours_come_back_as_the_same_function(family: str, method: Any, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, name="a", seed=0)
    shake(adapter, 1)
    path = save(adapter, tmp_path / "a")
    again = load(path, family).model
    inputs = FAMILIES[family].inputs()
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)
    config = json.loads((path / "adapter_config.json").read_text())["config"]
    assert config.keys() == PREFIX.keys()
    assert config["leave_out"] == ([0] if method.layers else [])


@pytest.mark.parametrize(
    ("family", "method", "told"),
    [
        ("t5", gt.PrefixTuning(length=3), "shifts the relative positions"),
        ("llama", gt.PrefixTuning(length=3), "heads aren't of 8 features"),
    ],
)
def test_what_adapterhub_cannot_compute_is_not_written(
    family: str, method: Any, told: str, tmp_path: Path
) -> None:
    more = {"head_dim": 16} if family == "llama" else {}
    adapter = gt.attach(FAMILIES[family].build(**more), method, name="a")
    with pytest.raises(FormatError, match=told):
        save(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()
