"""What every method has: settings that are documented, checked, written out and read back."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.methods import base
from graftune.methods.base import Method
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

words = st.text("abcdefghijklmnop.*_", min_size=1, max_size=8)
layers = st.none() | st.integers(-4, 30) | st.lists(st.integers(-3, 9), min_size=1, max_size=3)
heads = st.none() | st.booleans() | st.lists(words, max_size=2).map(tuple)


def lycoris() -> dict[str, st.SearchStrategy[Any]]:
    """Settings that LoHa and LoKr share."""
    return {
        "r": st.integers(1, 512),
        "alpha": st.none() | st.floats(0, 1e4),
        "targets": words,
        "layers": layers,
        "rank_dropout": st.floats(0, 1, exclude_max=True),
        "tucker": st.booleans(),
        "rank_pattern": st.none() | st.dictionaries(st.just("query"), st.integers(1, 9)),
    }


MADE: dict[str, Callable[..., st.SearchStrategy[Method]]] = {
    "LoRA": lambda: st.builds(
        gt.LoRA,
        r=st.integers(1, 512),
        alpha=st.none() | st.floats(0, 1e4) | st.integers(1, 64),
        dropout=st.floats(0, 1, exclude_max=True),
        targets=words | st.lists(words, min_size=1, max_size=3),
        exclude=st.lists(words, max_size=2),
        layers=layers,
        rslora=st.booleans(),
        init=st.sampled_from(["zero-B", "gaussian"]),
        bias=st.sampled_from(["none", "all", "lora_only"]),
        rank_pattern=st.none() | st.dictionaries(st.just("query"), st.integers(1, 9)),
        trainable_tokens=st.none()
        | st.lists(st.integers(0, 99), max_size=3)
        | st.dictionaries(st.just("wte"), st.lists(st.integers(0, 99), max_size=3)),
        lr_ratio=st.none() | st.floats(0, 64),
        train_head=heads,
    ),
    **{
        name: lambda method=method: st.builds(
            method,
            sublayers=st.just(("ffn",)),
            reduction=st.integers(1, 64) | st.just({"0": 4, "default": 8}),
            dropout=st.floats(0, 1, exclude_max=True),
            scale=st.floats(-4, 4) | st.sampled_from(["learned", "channel"]),
            gate=st.sampled_from([None, "mean", "token"]),
            layers=layers,
            train_norms=st.booleans(),
            train_head=heads,
        )
        for name, method in (
            ("HoulsbyAdapter", gt.HoulsbyAdapter),
            ("PfeifferAdapter", gt.PfeifferAdapter),
            ("ParallelAdapter", gt.ParallelAdapter),
            ("AdapterPlus", gt.AdapterPlus),
            ("Compacter", gt.Compacter),
            ("CompacterPlusPlus", gt.CompacterPlusPlus),
        )
    },
    **{
        name: lambda method=method: st.builds(
            method,
            length=st.integers(1, 99),
            hidden=st.none() | st.integers(1, 512),
            dropout=st.floats(0, 1, exclude_max=True),
            layers=layers,
            train_head=heads,
        )
        for name, method in (("PrefixTuning", gt.PrefixTuning), ("PTuningV2", gt.PTuningV2))
    },
    **{
        name: lambda method=method: st.builds(
            method,
            r=st.integers(1, 64),
            prefix_positions=st.integers(1, 9),
            suffix_positions=st.integers(0, 9),
            tied=st.booleans(),
            dropout=st.floats(0, 1, exclude_max=True),
            layers=layers,
            train_head=heads,
        )
        for name, method in (("LoReFT", gt.LoReFT), ("NoReFT", gt.NoReFT), ("DiReFT", gt.DiReFT))
    },
    "PTuning": lambda: st.builds(
        gt.PTuning,
        length=st.integers(1, 99),
        encoder=st.sampled_from(["lstm", "mlp"]),
        hidden=st.none() | st.integers(1, 512),
        marker=st.none() | st.integers(0, 99),
        train_head=heads,
    ),
    "MultitaskPromptTuning": lambda: st.builds(
        gt.MultitaskPromptTuning,
        length=st.integers(1, 99),
        tasks=st.integers(1, 9),
        r=st.integers(1, 4),
        task_init=st.sampled_from(["ones", "normal"]),
        train_head=heads,
    ),
    "LLaMAAdapter": lambda: st.builds(
        gt.LLaMAAdapter,
        length=st.integers(1, 99),
        gate=st.sampled_from(["head", "layer"]),
        layers=layers,
        train_head=heads,
    ),
    "MAM": lambda: st.builds(
        gt.MAM,
        length=st.integers(1, 99),
        hidden=st.none() | st.integers(1, 512),
        bottleneck=st.none() | st.integers(1, 512),
        scale=st.floats(-4, 4) | st.just("learned"),
        layers=layers,
        train_head=heads,
    ),
    "UniPELT": lambda: st.builds(
        gt.UniPELT,
        length=st.integers(1, 99),
        r=st.integers(1, 99),
        gate=st.sampled_from([None, "auto", "mean-padded"]),
        submodules=st.sampled_from([("prefix", "adapter"), ("lora",), ("lora", "prefix")]),
        layers=layers,
        train_head=heads,
    ),
    "UnifiedAdapter": lambda: st.builds(
        gt.UnifiedAdapter,
        form=st.sampled_from(["relu", "gelu", "linear"]),
        insertion=st.sampled_from(["parallel", "sequential"]),
        location=st.sampled_from(["matrix", "attention", "ffn"]),
        composition=st.sampled_from(["scaled", "gated"]),
        scale=st.none() | st.floats(-4, 4),
        k=st.integers(1, 99),
        layers=layers,
        train_head=heads,
    ),
    "Union": lambda: st.builds(
        gt.Union,
        methods=st.just((gt.LoRA(r=2), gt.BitFit())) | st.just(({"name": "ia3", "layers": [1]},)),
        train_head=heads,
    ),
    "PromptTuning": lambda: st.builds(gt.PromptTuning, length=st.integers(1, 99), train_head=heads),
    "AdapterFusion": lambda: st.builds(
        gt.AdapterFusion,
        members=st.just(("a", "b")) | st.just((("a", "c"), "b")),
        value=st.booleans(),
        value_penalty=st.floats(0, 1),
        train_head=heads,
    ),
    "BitFit": lambda: st.builds(
        gt.BitFit, subset=words, layers=layers, add_missing=st.booleans(), train_head=heads
    ),
    "FullFineTuning": lambda: st.builds(
        gt.FullFineTuning, keep_base=st.booleans(), train_head=heads
    ),
    "AdaLoRA": lambda: st.builds(
        gt.AdaLoRA,
        r=st.integers(12, 64),
        target_r=st.integers(1, 12),
        targets=words,
        layers=layers,
        tinit=st.none() | st.integers(0, 99),
        delta_t=st.none() | st.integers(1, 99),
        beta1=st.floats(0, 1, exclude_max=True),
        orthogonal_form=st.sampled_from(["released", "paper"]),
        rank_pattern=st.none() | st.dictionaries(words, st.integers(0, 12), max_size=2),
        train_head=heads,
    ),
    "LoHa": lambda: st.builds(gt.LoHa, **lycoris(), train_head=heads),
    "LoKr": lambda: st.builds(
        gt.LoKr,
        **lycoris(),
        decompose_both=st.booleans(),
        decompose_factor=st.just(-1) | st.integers(1, 64),
        init=st.sampled_from(["zero-W1", "lycoris"]),
        scaling=st.sampled_from(["peft", "lycoris"]),
    ),
    "VeRA": lambda: st.builds(
        gt.VeRA,
        r=st.integers(1, 512),
        d_initial=st.floats(0.01, 9),
        targets=words,
        layers=layers,
        projection_seed=st.integers(0, 2**63 - 1),
        save_projection=st.booleans(),
    ),
    "IA3": lambda: st.builds(
        gt.IA3,
        targets=words | st.lists(words, max_size=2),
        feedforward=words | st.lists(words, min_size=1, max_size=2),
        layers=layers,
    ),
    "Selective": lambda: st.builds(
        gt.Selective, targets=words | st.lists(words, max_size=2), layers=layers, exclude=words
    ),
    "LayerNormTuning": lambda: st.builds(
        gt.LayerNormTuning, which=st.sampled_from(["all", "weight", "bias"]), layers=layers
    ),
    "DiffPruning": lambda: st.builds(
        gt.DiffPruning,
        keep=st.floats(1e-4, 1),
        fixed_share=st.floats(0, 1, exclude_max=True),
        structured=st.booleans(),
        l0_form=st.sampled_from(["released", "paper"]),
        targets=words,
        layers=layers,
    ),
    "FishMask": lambda: st.builds(
        gt.FishMask,
        keep=st.floats(1e-4, 1),
        samples=st.integers(1, 9999),
        fisher=st.sampled_from(["empirical", "sampled"]),
        layers=layers,
    ),
    "SAID": lambda: st.builds(
        gt.SAID,
        d=st.integers(1, 10**9),
        structure_aware=st.booleans(),
        targets=words | st.lists(words, max_size=2),
        layers=layers,
        seed=st.integers(0, 2**31 - 1),
    ),
    "LadderSideTuning": lambda: st.builds(
        gt.LadderSideTuning,
        reduction=st.integers(1, 64),
        drop=st.lists(st.integers(0, 40), max_size=4),
        init=st.sampled_from(["magnitude", "fisher", "random"]),
        samples=st.integers(1, 4096),
        temperature=st.floats(1e-3, 10),
        ending=st.sampled_from(["replace", "add"]),
        dropout=st.none() | st.floats(0, 1, exclude_max=True),
        trunk_dropout=st.booleans(),
        train_head=heads,
    ),
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Method]]:
    """A registry that forgets what a test puts into it."""
    gt.methods()
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    return base._registry


@given(st.data())
def test_settings_survive_json(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(list(MADE)).flatmap(lambda name: MADE[name]()))
    written = json.loads(json.dumps(method.to_dict()))
    assert written["method"] == method.name
    again = Method.from_dict(written)
    assert again == method
    assert type(again) is type(method)
    assert again.to_dict() == method.to_dict()


def test_every_method_of_the_package_is_tried() -> None:
    own = {n for n, m in gt.methods().items() if m.__module__.startswith("graftune.")}
    assert own == set(MADE)


@pytest.mark.parametrize("name", list(MADE))
def test_every_setting_says_what_it_is(name: str) -> None:
    method = gt.methods()[name]
    settings = {setting.name: setting for setting in method.settings()}
    assert list(settings) == [field.name for field in dataclasses.fields(method)]
    for setting in settings.values():
        assert setting.doc.endswith("."), setting
        assert setting.type, setting
        assert setting.default == getattr(method, setting.name)
    assert method.summary.endswith(".")
    assert "train_head" in settings


def test_settings_can_not_be_changed_and_compare_by_value() -> None:
    method = gt.LoRA(r=4, targets=["query", "value"])  # type: ignore[arg-type]
    assert method == gt.LoRA(r=4, targets=("query", "value"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.r = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        gt.LoRA(8)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "LoRA", "rank": 8}, ['LoRA has no setting "rank"', "rank_pattern"]),
        ({"method": "LoRA", "dropuot": 0.1}, ['"dropuot"', 'Did you mean "dropout"?']),
        ({"method": "Lora2"}, ['No method is named "Lora2"', "BitFit", 'Did you mean "LoRA"?']),
        ({"method": "BitFit", "r": 8}, ['BitFit has no setting "r"', "subset"]),
        ({"method": "LoRA", "r": 0}, ["LoRA: r is 0"]),
    ],
)
def test_what_can_not_be_read_is_refused_with_the_nearest(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as error:
        Method.from_dict(settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_method_is_found_whatever_its_case() -> None:
    assert Method.from_dict({"method": "lora", "r": 2}) == gt.LoRA(r=2)
    assert gt.LoRA.from_dict({"r": 2}) == gt.LoRA(r=2)


def test_a_name_is_taken_once(registry: dict[str, type[Method]]) -> None:
    class Other(Method):
        name = "LoRA"

    with pytest.raises(SettingsError, match='A method named "LoRA" is registered already'):
        gt.register(Other)
    assert registry["LoRA"] is gt.LoRA


def test_attach_takes_a_method_not_a_class() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(SettingsError, match="attach takes a method such as"):
        gt.attach(model, gt.LoRA)  # type: ignore[arg-type]
    assert gt.adapters(model) == {}


THEIRS = '''
"""A scale for each output of the query projections."""

from dataclasses import dataclass

import torch
from torch import nn

import graftune as gt
from graftune.methods.base import Method
from graftune.sites.base import Graft, LinearDelta, LinearPlace


class Factor(LinearDelta):
    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))

    def forward(self, x, y, host):
        return y * self.factor


@gt.register
@dataclass(frozen=True, kw_only=True)
class QueryScale(Method):
    """Scales queries."""

    name = "QueryScale"
    summary = "Scales queries."

    layers: int | None = None
    """Blocks."""

    def plan(self, model, anatomy, *, empty=False):
        chosen = gt.resolve(model, anatomy, "query", self.layers)
        width = lambda part: model.get_submodule(part.module).out_features
        return [Graft(LinearPlace(p.module, p.role, p.rows), Factor(width(p))) for p in chosen]
'''


def test_a_third_partys_method_is_one_class_in_one_file(
    registry: dict[str, type[Method]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "query_scale.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("query_scale")
    method = Method.from_dict({"method": "queryscale", "layers": 0})
    assert method == gt.QueryScale(layers=0)
    assert [s.doc for s in method.settings()][-1] == "Blocks."
    model, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    base_logits = logits(model, inputs)
    adapter = gt.attach(model, method, "theirs")
    assert torch.equal(logits(model, inputs), base_logits)
    shake(adapter, seed=1)
    expected = logits(model, inputs)
    adapter.save(tmp_path / "theirs")
    fresh = FAMILIES["bert"].build()
    gt.load(fresh, tmp_path / "theirs")
    assert torch.equal(logits(fresh, inputs), expected)
    with pytest.raises(AdapterError, match="A Factor can't be merged"):
        gt.merge(model, "theirs")


def test_a_method_without_source_has_settings_without_words() -> None:
    typed = dataclasses.make_dataclass(
        "Typed", [("size", int, 3)], bases=(Method,), frozen=True, kw_only=True
    )
    found = {s.name: (s.default, s.doc) for s in typed.settings()}
    assert found["size"] == (3, "")
    assert found["train_head"][1].startswith("Heads trained with it")
