"""Pins graftune's public names: adding or losing one is a decision, not an accident."""

from __future__ import annotations

import importlib.metadata

import pytest

import graftune

PUBLIC = [
    "AdaLoRA",
    "Adapter",
    "AdapterCallback",
    "AdapterDrop",
    "AdapterFusion",
    "AdapterPlus",
    "Anatomy",
    "Average",
    "BitFit",
    "Compacter",
    "CompacterPlusPlus",
    "DiReFT",
    "DiffPruning",
    "FishMask",
    "FullFineTuning",
    "Fuse",
    "HoulsbyAdapter",
    "IA3",
    "LLaMAAdapter",
    "LadderSideTuning",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "MAM",
    "MultitaskPromptTuning",
    "NoReFT",
    "PTuning",
    "PTuningV2",
    "Parallel",
    "ParallelAdapter",
    "PfeifferAdapter",
    "Plan",
    "PlanSettings",
    "PrefixTuning",
    "PromptTuning",
    "Rows",
    "SAID",
    "Selective",
    "Stack",
    "Trainer",
    "TrunkCache",
    "UniPELT",
    "UnifiedAdapter",
    "Union",
    "VeRA",
    "activate",
    "adapters",
    "anatomy",
    "as_prefix",
    "attach",
    "chunked_loss",
    "combine",
    "detach",
    "fit",
    "fusion_weights",
    "gates",
    "inspect",
    "load",
    "merge",
    "methods",
    "plan",
    "prune_fusion",
    "register",
    "resolve",
    "state_of",
    "summary",
    "unmerge",
    "using",
    "vote",
]


def test_all_is_what_is_promised() -> None:
    assert sorted(graftune.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_there_and_documented(name: str) -> None:
    assert getattr(graftune, name).__doc__


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(graftune))


def test_an_unknown_name_is_an_attribute_error_that_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="attach"):
        graftune.atach  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_version_is_that_of_the_package() -> None:
    assert graftune.__version__ == importlib.metadata.version("graftune")


def test_every_method_is_at_hand_under_its_name() -> None:
    from graftune.methods import methods

    assert {name: getattr(graftune, name) for name in methods()} == methods()
