"""Every setting of PEFT's LoRA is read, without effect or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graftune.errors import FormatError
from graftune.formats import peft_settings
from graftune.formats.peft_settings import (
    checked,
    saved_modules,
    targeted_modules,
    targeted_parameters,
)

MODULES = [
    "",
    "model",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.q_proj",
    "model.blocks.1.q_proj",
    "lm_head",
    "lm_head.q_proj",
    "my_q_proj",
]


def config(**settings: Any) -> dict[str, Any]:
    return checked({"peft_type": "LORA"} | settings, "here")


def test_every_field_of_peft_is_in_one_table() -> None:
    peft = pytest.importorskip("peft", reason="the table is compared with PEFT's own fields")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    tables = [peft_settings.READ, peft_settings.WITHOUT_EFFECT, tuple(peft_settings.REFUSED)]
    listed = [name for table in tables for name in table]
    assert len(listed) == len(set(listed))
    assert fields <= set(listed)


def test_defaults_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="the defaults are compared with PEFT's own")
    theirs = peft.LoraConfig().to_dict()
    for key, value in peft_settings.DEFAULTS.items():
        if key not in ("inference_mode", "peft_type"):
            assert theirs[key] == value, key


@pytest.mark.parametrize("key", sorted(peft_settings.REFUSED))
def test_what_is_not_supported_is_refused_by_name(key: str) -> None:
    with pytest.raises(FormatError, match=rf'"{key}".*PEFT 0\.21\.2.*not supported'):
        config(**{key: {"x": 1}, "peft_version": "0.21.2"})
    for neutral in (None, False, [], {}):
        config(**{key: neutral})


def test_an_unknown_setting_names_key_value_version_and_the_nearest() -> None:
    with pytest.raises(FormatError, match=r'"use_dorra" \(True\).*PEFT 9\.9.*Did you mean "use_do'):
        config(use_dorra=True, peft_version="9.9")
    with pytest.raises(FormatError, match="doesn't give its version"):
        config(use_dorra=True)
    config(from_the_future=None)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq", "lora_ga", "what"])
def test_changed_bases_that_are_not_in_the_file_are_refused(init: str) -> None:
    with pytest.raises(FormatError, match="path_initial_model_for_weight_conversion"):
        config(init_lora_weights=init)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", float("nan")),
        ("bias", "some"),
        ("rank_pattern", [1]),
        ("target_modules", 5),
        ("modules_to_save", [1]),
    ],
)
def test_wrong_values_are_told(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f'"{key}" is'):
        config(**{key: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head", "layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.self_attn\..*"},
        {"target_modules": r"model\.layers\.0"},
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*experts.*"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["no", "layers"],
        },
    ],
)
def test_targets_are_matched_as_peft_does(settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="compared with PEFT's own matching")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**settings)
    expected = [m for m in MODULES if m and check_target_module_exists(theirs, m)]
    assert targeted_modules(config(**settings), MODULES) == expected


def test_parameters_and_saved_modules_are_matched_by_their_ends() -> None:
    given = config(target_parameters=["experts.down"], modules_to_save=["lm_head"])
    assert targeted_parameters(given, ["a.experts.down", "a.experts.up"]) == ["a.experts.down"]
    assert saved_modules(given, MODULES) == ["lm_head"]


def test_a_broken_expression_is_told() -> None:
    with pytest.raises(FormatError, match="isn't a regular expression"):
        targeted_modules(config(target_modules="(x"), MODULES)
