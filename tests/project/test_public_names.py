"""Pins graftune's public names: adding or losing one is a decision, not an accident."""

from __future__ import annotations

import pytest

import graftune

PUBLIC = [
    "Adapter",
    "AdapterError",
    "Anatomy",
    "AnatomyError",
    "BaseMismatchError",
    "BitFit",
    "DataError",
    "FormatError",
    "FullFineTuning",
    "GraftuneError",
    "LoRA",
    "Method",
    "Rows",
    "SettingsError",
    "Stack",
    "Summary",
    "Trainer",
    "TrainingError",
    "__version__",
    "activate",
    "adapters",
    "anatomy",
    "attach",
    "detach",
    "load",
    "merge",
    "methods",
    "register",
    "summary",
    "unmerge",
    "using",
]


def test_all_is_what_is_promised() -> None:
    assert sorted(graftune.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_there_and_documented(name: str) -> None:
    value = getattr(graftune, name)
    assert name == "__version__" or value.__doc__


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(graftune))


def test_an_unknown_name_is_an_attribute_error_that_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="attach"):
        graftune.atach  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
